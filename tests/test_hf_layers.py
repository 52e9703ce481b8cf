"""Decoder layers of transformers models run by ours: what they compute, and which way."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_models import CASES, TINY, W8, logits_of, prompt, random_model

import qkernels as qk
from qkernels.convert import QuantWarning
from qkernels.loading import Checkpoint

transformers = pytest.importorskip("transformers", reason="the layers are those of transformers")

from qkernels.hf.layers.cache import PagedLayer  # noqa: E402
from qkernels.hf.layers.stack import DecoderStack  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GREEDY = {"do_sample": False, "pad_token_id": 0}
W4 = qk.QuantSpec(4, 16, scale="float32")


def quantized(case: str, spec: Any = W8, act: str = "float", **arguments: Any) -> Any:
    model = random_model(case)
    model.generation_config.eos_token_id = None  # as many tokens as asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)  # these models are all table
        qk.quantize_(model, spec, act=act, progress=False, **arguments)
    return model


def replaced(model: Any, **arguments: Any) -> Any:
    return qk.replace_decoder_layers_(copy.deepcopy(model), **{"kv_dtype": "float32", **arguments})


@contextmanager
def ways(model: Any) -> Iterator[list[Any]]:
    """What runs: None for all layers at once, the number of a layer, or "host"."""
    stack = model.get_decoder().layers
    seen: list[Any] = []
    run, host = stack.run, stack.host
    stack.run = lambda hidden, layer, **named: (seen.append(layer), run(hidden, layer, **named))[1]
    stack.host = lambda *given: (seen.append("host"), host(*given))[1]
    try:
        yield seen
    finally:
        del stack.run, stack.host


def near(model: Any, ours: torch.Tensor, ids: torch.Tensor, **named: Any) -> None:
    """As tests/test_hf_models.py: within twice the error of transformers' float32."""
    dense = qk.dequantize_(copy.deepcopy(model))
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(ids, **named).logits
        theirs = (dense.float()(ids, **named).logits - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * theirs + ids.shape[1] * 2.0**-24 * exact.abs().max()


# What they compute


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(case: str) -> None:
    model = quantized(case)
    ours = replaced(model)
    stack = ours.get_decoder().layers
    assert isinstance(stack, DecoderStack) and stack.plan(torch.float32).native
    ids = prompt()
    with ways(ours) as seen:
        logits = ours(ids).logits
        assert torch.equal(ours(ids, use_cache=False).logits, logits)
        assert ours(ids, use_cache=False).past_key_values is None
    assert seen == [None] * 3
    near(model, logits, ids)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_generate_gives_the_tokens_of_the_same_model_with_its_own_layers(case: str) -> None:
    model = quantized(case)
    ours = replaced(model)
    ids = prompt()[:1, :40]
    with ways(ours) as seen:
        out = ours.generate(ids, max_new_tokens=24, **GREEDY)
    assert seen == [None] * 24
    logits = model(out).logits[0, ids.shape[1] - 1 : -1]
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.sum() > 10
    assert torch.equal(logits.argmax(-1)[clear], out[0, ids.shape[1] :][clear])


@pytest.mark.parametrize("case", ["llama-tied", "gemma3"])
@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
@torch.no_grad()
def test_int8_activations_and_small_caches_are_those_of_the_decoder(
    case: str, kv_dtype: str
) -> None:
    ours = replaced(quantized(case, act="int8"), kv_dtype=kv_dtype)
    stack, body = ours.model.layers, ours.model
    ropes = stack.model_config.ropes
    weights = {n: w for n, w in stack._weights().items() if n not in ropes}
    offset = 1.0 if case == "gemma3" else 0.0
    weights |= {"embed.weight": body.embed_tokens.weight, "norm.weight": body.norm.weight + offset}
    checkpoint = Checkpoint(stack.family, stack.model_config, weights, case)
    decoder = qk.QuantDecoder(checkpoint, act="int8", kv_dtype=kv_dtype)
    # The same bits up to the last norm and the dense head, which are the host's here.
    assert torch.allclose(ours(prompt()).logits, decoder(prompt()).logits, atol=1e-4)


@torch.no_grad()
def test_dense_layers_run_op_by_op() -> None:
    model = random_model("qwen3")
    ours = replaced(model)
    plan = ours.get_decoder().layers.plan(torch.float32)
    assert not plan.native and "dense" in (plan.because or "")
    near(model, ours(prompt()).logits, prompt())


@torch.no_grad()
def test_a_spec_quantizes_first() -> None:
    model = random_model("llama-tied")
    ours = replaced(model, spec="W4A8", embeddings="W8A8", group_size=16)
    qk.quantize_(model, "W4A8", embeddings="W8A8", group_size=16, progress=False)
    assert torch.equal(ours(prompt()).logits, replaced(model)(prompt()).logits)
    assert type(ours.lm_head) is type(ours.model.layers[0].mlp.up_proj) is qk.nn.QuantLinear


@torch.no_grad()
def test_bfloat16_hosts_keep_their_type() -> None:
    model = quantized("llama").bfloat16()
    ours = replaced(model)
    logits = ours(prompt()).logits
    assert logits.dtype == torch.bfloat16
    exact = logits_of(qk.dequantize_(copy.deepcopy(model)), prompt(), torch.float64)
    theirs = (model(prompt()).logits - exact).abs().max()
    assert (logits - exact).abs().max() <= 2 * theirs


@torch.no_grad()
def test_a_head_for_classes_runs_on_them_too() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    qk.quantize_(model, W8, act="float", modules_to_not_convert=("score",), progress=False)
    ours = replaced(model)
    with ways(ours) as seen:
        logits = ours(prompt()).logits
    assert seen == [None]
    assert torch.allclose(logits, model(prompt()).logits, atol=1e-5)
    bare = replaced(model.model)
    assert torch.equal(bare(prompt()).last_hidden_state, ours.model(prompt()).last_hidden_state)


# Batches


@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma3"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(case: str) -> None:
    model = quantized(case)
    ours = replaced(model)
    lengths, width = [30, 7, 41], 41
    for side in ("left", "right"):
        ids = torch.zeros(3, width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(lengths):
            where = slice(width - n, None) if side == "left" else slice(n)
            ids[row, where], mask[row, where] = prompt()[row % 2, :n], 1
        for mine in (
            None,
            (mask.cumsum(1) - 1).clamp_min(0),
        ):  # positions that count padding or not
            logits = ours(ids, attention_mask=mask, position_ids=mine).logits
            for row, n in enumerate(lengths):
                alone = ours(prompt()[row % 2 : row % 2 + 1, :n]).logits[0]
                assert torch.allclose(logits[row, mask[row].bool()], alone, atol=2e-5)
    texts = ours.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=9, **GREEDY)
    theirs = model.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=9, **GREEDY)
    assert torch.equal(texts, theirs)


@torch.no_grad()
def test_prompts_longer_than_a_chunk() -> None:
    config = copy.deepcopy(CASES["llama-tied"])
    config.max_position_embeddings = 2048
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    qk.quantize_(model, W8, act="float", progress=False)
    ours = replaced(model)
    ids = torch.randint(4, 160, (2, 700), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :150] = 0
    logits = ours(ids, attention_mask=mask, logits_to_keep=3).logits
    theirs = model(ids, attention_mask=mask, logits_to_keep=3).logits
    assert torch.allclose(logits, theirs, atol=1e-4)
    out = ours.generate(ids[1:], max_new_tokens=4, prefill_chunk_size=300, **GREEDY)
    assert torch.equal(out, ours.generate(ids[1:], max_new_tokens=4, **GREEDY))


# The cache


@torch.no_grad()
def test_a_conversation_goes_on_in_its_cache() -> None:
    ours = replaced(quantized("qwen3"))
    ids = prompt()[:1]
    cache = transformers.DynamicCache()
    first = ours.generate(ids[:, :20], past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert isinstance(cache.layers[0], PagedLayer) and cache.get_seq_length() == 25
    assert cache.batch_size == 1 and cache.get_max_length() == 256
    longer = torch.cat([first, ids[:, 20:30]], dim=1)
    with ways(ours) as seen:
        second = ours.generate(longer, past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert len(seen) == 6
    assert torch.equal(second, ours.generate(longer, max_new_tokens=6, **GREEDY))
    # A prefix for several questions; and what is cut off is forgotten.
    prefix = ours(ids[:, :30], past_key_values=transformers.DynamicCache()).past_key_values
    for question in (ids[:, 30:44], ids[:, 50:57]):
        whole = torch.cat([ids[:, :30], question], dim=1)
        out = ours.generate(
            whole, past_key_values=copy.deepcopy(prefix), max_new_tokens=5, **GREEDY
        )
        assert torch.equal(out, ours.generate(whole, max_new_tokens=5, **GREEDY))
    assert prefix.get_seq_length() == 30
    prefix.crop(-12)
    assert prefix.get_seq_length() == 18
    logits = ours(ids[:, 18:40], past_key_values=prefix).logits
    assert torch.allclose(logits, ours(ids[:, :40]).logits[:, 18:], atol=2e-5)
    prefix.reset()
    assert prefix.get_seq_length() == 0
    assert torch.equal(ours(ids, past_key_values=prefix).logits, ours(ids).logits)


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_selected_and_reordered() -> None:
    ours = replaced(quantized("llama"))
    ids = prompt()[:, :30]
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    tails = prompt()[:, 40:50]

    def after(change: Any, rows: list[int]) -> None:
        cache = ours(ids, attention_mask=mask).past_key_values
        change(cache)
        given = torch.cat([mask[rows], torch.ones(len(rows), 10, dtype=torch.int64)], dim=1)
        tail = tails[[0] * len(rows)]
        logits = ours(tail, attention_mask=given, past_key_values=cache).logits
        whole = torch.cat([ids[rows], tail], dim=1)
        wanted = ours(whole, attention_mask=given).logits[:, 30:]
        assert torch.allclose(logits, wanted, atol=2e-5)

    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    after(lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1])
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1])
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])


@pytest.mark.parametrize("case", ["llama-tied", "gemma3"])
@torch.no_grad()
def test_beams_samples_streams_and_drafts(case: str) -> None:
    model = quantized(case)
    ours = replaced(model)
    ids = prompt()[:1, :33]
    for how in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "num_return_sequences": 1},
    ):
        out = []
        for one in (model, ours):
            torch.manual_seed(3)
            out.append(one.generate(ids, max_new_tokens=10, pad_token_id=0, **how))
        assert torch.equal(*out), how

    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    plain = ours.generate(ids, max_new_tokens=12, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*plain[0].tolist(), -1]
    guessed = ours.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(guessed, plain)
    drafted = ours.generate(ids, max_new_tokens=12, assistant_model=replaced(model), **GREEDY)
    assert torch.equal(drafted, plain)


# Who looks in between


@pytest.mark.parametrize("case", ["qwen2", "gemma3"])
@torch.no_grad()
def test_hidden_states_are_those_of_every_layer(case: str) -> None:
    model = quantized(case)
    ours = replaced(model)
    ids = prompt()
    plain = ours(ids).logits
    with ways(ours) as seen:
        out = ours(ids, output_hidden_states=True)
        assert seen == [0, 1, 2]
        assert torch.equal(ours(ids).logits, plain) and seen[3:] == [None]
    assert torch.equal(out.logits, plain)
    theirs = model(ids, output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(theirs) == 4
    for a, b in zip(out.hidden_states, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    # In a generation, with a cache.
    told = ours.generate(
        ids[:, :9],
        max_new_tokens=3,
        output_hidden_states=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert torch.equal(told.sequences, ours.generate(ids[:, :9], max_new_tokens=3, **GREEDY))
    assert [len(states) for states in told.hidden_states] == [4, 4, 4]


@torch.no_grad()
def test_hooks_are_called() -> None:
    ours = replaced(quantized("llama"))
    layer = ours.model.layers[1]
    plain = ours(prompt()).logits
    seen: list[str] = []
    outside = layer.register_forward_hook(lambda m, args, out: seen.append("layer"))
    inside = layer.mlp.register_forward_pre_hook(lambda m, args: seen.append("mlp"))
    with ways(ours) as way:
        assert torch.allclose(ours(prompt()).logits, plain, atol=1e-4)
        assert way == ["host"] * 3 and seen == ["mlp", "layer"]
        inside.remove()
        assert torch.equal(ours(prompt()).logits, plain)
        assert way[3:] == [0, 1, 2] and seen[2:] == ["layer"]
        outside.remove()
        assert torch.equal(ours(prompt()).logits, plain) and way[6:] == [None]


@torch.no_grad()
def test_a_layer_can_be_called_by_itself() -> None:
    model = quantized("mistral-window")
    ours = replaced(model)
    x = torch.randn(2, 40, 64)
    angles = model.model.rotary_emb(x, torch.arange(40)[None])
    window = torch.ones(40, 40, dtype=torch.bool).tril().triu(-23)[None, None]
    for i in (0, 2):
        theirs = model.model.layers[i](x, attention_mask=window, position_embeddings=angles)
        assert torch.allclose(ours.model.layers[i](x), theirs, atol=1e-4)
    # A model without its last layers is a plain list of the same layers.
    ours.model.layers = ours.model.layers[:2]
    ours.config.num_hidden_layers = 2
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    assert torch.allclose(ours(prompt()).logits, model(prompt()).logits, atol=1e-4)


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model = quantized("gemma3")
    ours = replaced(model)
    before = ours(prompt()).logits
    for one in (model, ours):
        one.model.layers[0].input_layernorm.weight.mul_(1.5)
        one.model.layers[1].mlp.up_proj.weight[:8].zero_()
    after = ours(prompt()).logits
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(after, model(prompt()).logits, atol=1e-4)
    ours.load_state_dict(replaced(quantized("gemma3")).state_dict())
    assert torch.equal(ours(prompt()).logits, before)


# Gradients and adapters


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3"])
def test_the_gradient_is_that_of_the_dequantized_model(case: str) -> None:
    model = quantized(case).requires_grad_(False)
    dense = qk.dequantize_(copy.deepcopy(model)).requires_grad_(False)
    ours = replaced(model)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :5] = 0
    results = []
    for one, dtype in ((ours, torch.float32), (dense, torch.float32), (dense, torch.float64)):
        x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
        x.requires_grad_()
        logits = copy.deepcopy(one).to(dtype)(inputs_embeds=x, attention_mask=mask).logits
        logits[mask.bool()].square().sum().backward()
        assert x.grad is not None
        results.append((logits[mask.bool()].detach().double(), x.grad[mask.bool()].double()))
    for got, theirs, exact in zip(*results, strict=True):
        assert (got - exact).abs().max() <= 2 * (
            theirs - exact
        ).abs().max() + 1e-6 * exact.abs().max()
    # The way without a gradient computes the same.
    with torch.no_grad(), ways(ours) as seen:
        x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(4))
        logits = ours(inputs_embeds=x, attention_mask=mask).logits[mask.bool()]
        assert seen == [None]
    assert torch.allclose(logits.double(), results[0][0], atol=1e-4)


def test_adapters_outside_and_inside() -> None:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    import qkernels.peft  # noqa: F401  (without it PEFT is refused packed layers)

    model = quantized("llama-tied", embeddings=None)
    wrap = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    ids = prompt()

    def adapted(one: Any, targets: list[str]) -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(one, peft.LoraConfig(target_modules=targets, **wrap)).eval()

    # On the table of embeddings: layers run whole, and through them goes a gradient.
    theirs = adapted(copy.deepcopy(model), ["embed_tokens"])
    ours = adapted(replaced(model), ["embed_tokens"])
    with torch.no_grad(), ways(ours) as seen:
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)
    assert seen == [None]
    gradients = []
    for one in (theirs, ours):
        one(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in one.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0 and torch.allclose(a, b, rtol=1e-3, atol=1e-6)

    # Inside layers: the host's modules run, adapters with them, and it is said once.
    theirs = adapted(copy.deepcopy(model), ["q_proj", "down_proj"])
    ours = adapted(replaced(model), ["q_proj", "down_proj"])
    said = pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj is a .*, not what was")
    with said, torch.no_grad(), ways(ours) as seen:
        logits = ours(ids).logits
    assert seen == ["host"] * 3 and torch.allclose(logits, theirs(ids).logits, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ours.generate(ids[:1, :20], max_new_tokens=4, **GREEDY)
    assert torch.equal(out, theirs.generate(ids[:1, :20], max_new_tokens=4, **GREEDY))
    ours(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if "lora_" in n)
    back = ours.unload()
    with torch.no_grad(), ways(back) as seen:
        assert torch.equal(back(ids).logits, replaced(model)(ids).logits)
    assert seen == [None]


# Into the model and out of it


@torch.no_grad()
def test_restored_models_are_what_they_were() -> None:
    model = quantized("qwen2", act="int8")
    before, names = model(prompt()).logits, list(model.state_dict())
    attention, layers = model.config._attn_implementation, [*model.model.layers]
    assert qk.replace_decoder_layers_(model, act="float") is model
    assert list(model.state_dict()) == names
    assert model.model.layers[0].mlp.up_proj.act == "float"
    inside = model(prompt()).logits
    assert not torch.equal(inside, before)
    assert qk.restore_decoder_layers_(model) is model
    assert type(model.model.layers) is torch.nn.ModuleList and [*model.model.layers] == layers
    assert model.config._attn_implementation == attention
    assert torch.equal(model(prompt()).logits, before)
    with pytest.raises(ValueError, match="are the host's own"):
        qk.restore_decoder_layers_(model)


@torch.no_grad()
def test_copies_pickles_and_dequantized_models() -> None:
    ours = replaced(quantized("gemma3"))
    plain = ours(prompt()).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with ways(other) as seen:
            assert torch.equal(other(prompt()).logits, plain)
        assert seen == [None]
        assert other.model.layers.plan(torch.float32).whole is not ours.model.layers._plan.whole
        assert other.model.layers[0].forward.stack is other.model.layers
    dense = qk.dequantize_(copy.deepcopy(ours))
    with ways(dense) as seen:
        assert torch.allclose(dense(prompt()).logits, plain, atol=1e-4)
    assert seen == [None] and not dense.model.layers._plan.native


@torch.no_grad()
def test_saved_as_if_nothing_had_been_replaced(tmp_path: Any) -> None:
    model = quantized("llama", "W4A16", group_size=16)
    ours = replaced(model)
    for name, one in (("theirs", model), ("ours", ours)):
        qk.save_pretrained(one, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "ours").iterdir())
    for name in files:
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_the_example_of_the_document_runs() -> None:
    code = (ROOT / "docs/decoder-layers.md").read_text().split("```python\n")[1].split("```")[0]
    model = random_model("llama-tied")
    names: dict[str, Any] = {"model": model, "ids": prompt()[:1, :10]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        exec(compile(code, "docs/decoder-layers.md", "exec"), names)
    assert names["out"].shape == (1, 18)
    assert type(model.model.layers[0].mlp.up_proj) is qk.nn.QuantLinear


def test_importing_qkernels_does_not_import_transformers() -> None:
    code = (
        "import sys, qkernels as qk; qk.replace_decoder_layers_; qk.restore_decoder_layers_; "
        "import qkernels.hf; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
