"""Decoding on a device of its own, its state in buffers there, on a CPU that plays the device: the
ops are those of the CPU or the emulated CUDA ones, and a recorded step is called again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpus import EMULATED, load_emulated
from test_decoder import RAW, SPEC, Letters, Random, greedy_by_logits, make
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels as qk
from qkernels import backends, cache, ops
from qkernels.generate import GenerationSettings, Loop, Request, Sampler
from qkernels.loading import load_hf
from qkernels.nn import QuantDecoder, graph, steps
from qkernels.ops import registry

PROMPTS: list[Any] = ["a", "the quick brown fox", [5, 6, 7], [9] * 60, "zz"]


def on_device(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """The CPU plays a device whose kernels are those of a namespace."""
    rows = {op: [backends.Row(op, "played", namespace, "cpu")] for op in registry.computing()}
    monkeypatch.setattr(backends, "_rows", rows)
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(QuantDecoder, "decodes_on_device", True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """With the kernels of the CPU: float32 gives the tokens of the CPU's own path."""
    with monkeypatch.context() as patch:
        on_device(patch, "qkernels")
        yield patch


@pytest.fixture(scope="module")
def cpu() -> QuantDecoder:
    return make()


def both(cpu: QuantDecoder, prompts: Any, **settings: Any) -> tuple[Any, Any]:
    """What the CPU's path and the device's say."""
    decoder = make()
    with pytest.MonkeyPatch.context() as patch:
        want = cpu.generate(prompts, **settings)
        on_device(patch, "qkernels")
        got = decoder.generate(prompts, **settings)
        assert decoder._device_steps is not None and decoder._device_steps._graphs
    return want, got


def count_launches(patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of every step that starts."""
    seen: list[tuple[int, int]] = []
    real = steps.DeviceSteps._launch

    def launch(self: Any, *args: Any) -> Any:
        result = real(self, *args)
        seen.append(self._shape)
        return result

    patch.setattr(steps.DeviceSteps, "_launch", launch)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 1.5, "seed": 1},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(cpu: QuantDecoder, settings: dict[str, Any]) -> None:
    """70 tokens: past the end of a page, in ragged batches that fill up the next recorded one."""
    want, got = both(cpu, PROMPTS, max_new_tokens=70, stop_at_eos=False, **settings)
    assert got.tokens == want.tokens and got.texts == want.texts
    assert got.finish_reasons == want.finish_reasons == ["length"] * 5
    assert got.timings.decode_tokens == want.timings.decode_tokens


def test_sequences_come_and_leave(cpu: QuantDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends at a token of its own; others take its place."""
    alone = [cpu.generate(p, max_new_tokens=40, stop_at_eos=False).tokens[0] for p in PROMPTS]
    eos = (alone[0][3], alone[1][11], alone[3][20])
    monkeypatch.setattr(
        Loop.__init__, "__kwdefaults__", {**Loop.__init__.__kwdefaults__, "max_batch": 3}
    )
    want, got = both(cpu, PROMPTS, max_new_tokens=40, eos_ids=eos)
    assert got.tokens == want.tokens and got.finish_reasons == want.finish_reasons
    assert "eos" in want.finish_reasons and len({len(tokens) for tokens in want.tokens}) > 2


def test_a_step_runs_ahead_unless_it_is_known_to_be_the_last(device: pytest.MonkeyPatch) -> None:
    launches = count_launches(device)
    decoder = make()
    tokens = decoder.generate("ab", max_new_tokens=30, stop_at_eos=False).tokens[0]
    assert launches == [(1, decoder.steps()._most_pages)] * 29  # the first comes of the prompt
    launches.clear()
    decoder.generate([3] * 155, max_new_tokens=100, stop_at_eos=False)  # the context ends at 160
    assert len(launches) == 5
    launches.clear()
    at = max(i for i in range(1, 20) if tokens[i] not in tokens[:i])
    ended = decoder.generate("ab", max_new_tokens=30, eos_ids=(tokens[at],)).tokens[0]
    assert ended == tokens[: at + 1] and len(launches) == at + 1  # one ran in vain


def test_the_cache_is_as_if_nothing_had_run_ahead(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    stream = decoder.stream("abc", max_new_tokens=30, stop_at_eos=False)
    for _ in range(4):
        next(stream)
    running = decoder.steps()
    handle = max(running.cache.lengths)
    assert running.cache.lengths[handle] == 3 + 4  # three of them in the cache, and one ahead
    with running.alone() as pages:
        assert pages.lengths[handle] == 3 + 3
    rest = list(stream)  # it goes on from there
    assert stream.tokens == greedy_by_logits(decoder, [ord(c) for c in "abc"], 30) and rest


def test_streams_take_turns(cpu: QuantDecoder, device: pytest.MonkeyPatch) -> None:
    decoder = make()
    want = [cpu_tokens(cpu, p, 12) for p in ("abc", "xy")]
    streams = [decoder.stream(p, max_new_tokens=12, stop_at_eos=False) for p in ("abc", "xy")]
    for _ in range(12):
        for stream in streams:
            next(stream)
    assert [stream.tokens for stream in streams] == want


def cpu_tokens(cpu: QuantDecoder, prompt: Any, count: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantDecoder, "decodes_on_device", False)
        return greedy_by_logits(cpu, cpu.encode(prompt), count)


def test_streams_of_threads_take_turns(cpu: QuantDecoder, device: pytest.MonkeyPatch) -> None:
    decoder, found = make(), {}

    def run(prompt: str) -> None:
        found[prompt] = decoder.generate(prompt, max_new_tokens=20, stop_at_eos=False).tokens[0]

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in ("abc", "xy", "q")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: cpu_tokens(cpu, prompt, 20) for prompt in ("abc", "xy", "q")}


def test_what_is_recorded_gives_the_bits_of_what_is_called(device: pytest.MonkeyPatch) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for recorded in (True, False):
        decoder = make()
        decoder.steps().recorded = recorded
        execute = decoder.executor()

        def watched(*args: Any, execute: Any = execute, to: Any = seen[recorded]) -> torch.Tensor:
            logits = execute(*args)
            to.append(logits.clone())
            return logits

        device.setattr(decoder, "executor", lambda watched=watched: watched)
        decoder.generate(PROMPTS[:3], max_new_tokens=8, stop_at_eos=False)
        assert bool(decoder.steps()._graphs) == recorded
    assert len(seen[True]) == len(seen[False]) + 1  # to record, it ran once more
    del seen[True][1]
    assert all(map(torch.equal, seen[True], seen[False]))


def test_one_step_is_recorded_per_shape(device: pytest.MonkeyPatch) -> None:
    device.setattr(steps, "FEWEST_PAGES", 1)
    device.setattr(steps, "TIMES_PAGES", 2)
    decoder = make()
    decoder.generate(PROMPTS[:3], max_new_tokens=60, stop_at_eos=False)
    assert list(decoder.steps()._graphs) == [(4, 1, False), (4, 2, False)]
    for _ in range(2):
        decoder.generate("a", max_new_tokens=140, repetition_penalty=1.1, stop_at_eos=False)
    assert list(decoder.steps()._graphs)[2:] == [(1, 1, True), (1, 2, True), (1, 3, True)]


def test_a_cache_that_moved_is_recorded_anew(cpu: QuantDecoder, device: pytest.MonkeyPatch) -> None:
    device.setattr(steps, "FIRST_TOKENS", 1)
    device.setattr(steps, "CALL_TOKENS", 1)
    decoder = make()
    tokens = decoder.generate("ab", max_new_tokens=150, stop_at_eos=False).tokens[0]
    assert decoder.steps().cache.moves > 2
    assert tokens == cpu_tokens(cpu, "ab", 150)


def test_chats_keep_their_cache(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    messages = [{"role": "user", "content": "hi"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantDecoder, "decodes_on_device", False)
        other = make()
        want = other.chat(messages, stream=False, max_new_tokens=9, stop_at_eos=False)
    first = decoder.chat(messages, stream=False, max_new_tokens=9, stop_at_eos=False)
    assert first.tokens == want.tokens
    messages += [
        {"role": "assistant", "content": first.texts[0]},
        {"role": "user", "content": "more"},
    ]
    decoder.generate("in between", max_new_tokens=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantDecoder, "decodes_on_device", False)
        want = other.chat(messages, stream=False, max_new_tokens=9, stop_at_eos=False)
    second = decoder.chat(messages, stream=False, max_new_tokens=9, stop_at_eos=False)
    assert second.tokens == want.tokens
    assert second.timings.reused_tokens == want.timings.reused_tokens > 10


def test_sequences_of_lost_pools_are_freed(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    decoder(torch.tensor([[1, 2, 3]]))
    stream = decoder.stream("abc", max_new_tokens=30)
    next(stream)
    del stream
    gc.collect()
    with decoder.steps().alone() as pages:
        assert len(pages.lengths) == 1  # the page of rows that fill up a batch


def test_an_error_leaves_the_next_call_alone(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    want = decoder.generate("abc", max_new_tokens=8, stop_at_eos=False).tokens
    real = decoder.steps()._step
    left = 3

    def fails(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        real(*args)

    device.setattr(decoder.steps(), "_step", fails)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate("abc", max_new_tokens=8, stop_at_eos=False)
    assert decoder.generate("abc", max_new_tokens=8, stop_at_eos=False).tokens == want


def test_logits_that_are_not_numbers_are_said(device: pytest.MonkeyPatch) -> None:
    """A GPU says so by a token."""
    decoder = make()
    device.setattr(
        steps, "select", lambda op, where: lambda logits, *_: torch.full((len(logits),), -1)
    )
    with pytest.raises(RuntimeError, match="logits of row 0 have a NaN"):
        decoder.generate("abc", max_new_tokens=2)  # no step on that token runs ahead


def test_warmup_records_what_is_usual(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    decoder.warmup()
    width = decoder.steps()._shape[1]
    assert list(decoder.steps()._graphs) == [(size, width, False) for size in steps.BATCHES]
    recorded = dict(decoder.steps()._graphs)
    decoder.generate(PROMPTS[:3], max_new_tokens=8)
    assert decoder.steps()._graphs == recorded  # nothing was left to do
    with decoder.steps().alone() as pages:
        assert len(pages.lengths) == 1
    for bad in ([0], [33], [1.5], [True]):
        with pytest.raises(ValueError, match="sequences decoded together are 1 to 32, got"):
            decoder.warmup(bad)  # type: ignore[arg-type]


def test_warmup_on_the_cpu(cpu: QuantDecoder) -> None:
    cpu.warmup()
    with pytest.raises(ValueError, match="warmup"):
        cpu.warmup([64])


def test_batch_sizes_and_widths() -> None:
    assert [steps.batch_of(n) for n in (1, 2, 3, 5, 9, 17, 32)] == [1, 2, 4, 8, 16, 32, 32]
    assert steps.BATCHES[-1] == steps.MAX_BATCH
    assert [steps.width_of(n, 500) for n in (1, 16, 17, 64, 65, 256, 257)] == [
        16, 16, 64, 64, 256, 256, 500,
    ]  # fmt: skip


def test_recording_undoes_what_the_first_run_did() -> None:
    state, seen = torch.tensor([5]), []

    def step() -> None:
        seen.append(int(state))
        state.add_(1)

    recording = graph.record(step, [state], torch.device("cpu"))
    assert int(state) == 5
    recording.replay()
    recording.replay()
    assert int(state) == 7 and seen == [5, 5, 6]


def test_the_reference_is_not_recorded(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    with qk.backend("reference"):
        assert decoder.uncaptured_because() == "the row 'reference' computes norm"
        decoder.generate("ab", max_new_tokens=3)
        assert not decoder.steps()._graphs
    assert decoder.uncaptured_because() is None
    decoder.generate("ab", max_new_tokens=3)
    assert decoder.steps()._graphs


def test_a_decoder_on_another_device_starts_anew(device: pytest.MonkeyPatch) -> None:
    decoder = make()
    decoder.generate("ab", max_new_tokens=3)
    before = decoder.steps()
    decoder.to("cpu")
    assert decoder.steps() is not before


# ---- 16 bits, as a GPU has them, on the emulated kernels ----


def emulated(patch: pytest.MonkeyPatch, **options: Any) -> QuantDecoder:
    load_emulated()
    missing = [
        op
        for op in ("embedding", "norm", "linear", "kv_append", "attention", "gate", "sample")
        if not backends.implemented(backends.Row(op, "", EMULATED), "cpu")
    ]
    if missing:
        pytest.skip(f"there is no emulated {', '.join(missing)} yet")
    on_device(patch, EMULATED)
    checkpoint = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))
    return QuantDecoder(checkpoint, tokenizer=Letters(), **options)


# Units in the last place of a type, relative to the largest logit. Each of the 2 layers rounds 12
# registers, each rounding an error of up to half a unit, which add up like a random walk:
# sqrt(24) / 2 = 2.5, or the half of that, as errors are uniform. That is of a usual logit; the
# largest is some 3 times as large, and so is the largest error.
UNITS = 4
# Where codes are rounded from values that differ by such units, some are other ones: a code of
# activations is off by 1 / 127 of the largest value of its group, of which there are 2 * 4 on the
# way; keys and values of 8 bits are the same for both but where they fall at a tie.
CODES = {"act": 0.05, "kv": 0.02}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_emulated_kernels_give_the_logits(
    dtype: str, act: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(3))
    kv = "float32" if kv_dtype == "auto" else kv_dtype
    want = make(act=act, kv_dtype=kv)(ids).logits
    decoder = emulated(monkeypatch, dtype=dtype, act=act, kv_dtype=kv_dtype)
    got = decoder(ids).logits
    unit = torch.finfo(getattr(torch, dtype)).eps
    codes = CODES["act"] if act == "int8" else CODES["kv"] if kv_dtype == "int8" else 0.0
    bound = (UNITS * unit + codes) * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


def test_emulated_kernels_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very tokens of float32 as long as those are clear: the first two logits further apart
    than rounding moves them."""
    truth = make(act="float")
    prompts = ["abc", [5, 6, 7], "zz"]
    decoder = emulated(monkeypatch, dtype="float16", act="float")
    out = decoder.generate(prompts, max_new_tokens=6, stop_at_eos=False)
    assert decoder.steps()._graphs
    monkeypatch.setattr(QuantDecoder, "decodes_on_device", False)
    monkeypatch.setattr(backends, "_rows", {})
    monkeypatch.setattr(backends, "_choices", {})
    compared = 0
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        ids = truth.encode(prompt)
        for token in tokens:
            logits = truth(torch.tensor([ids]), logits_to_keep=1).logits[0, 0]
            top = logits.topk(2)
            if top.values[0] - top.values[1] < 2 * UNITS * 2.0**-10 * logits.abs().max():
                break
            assert token == int(top.indices[0])
            ids, compared = [*ids, token], compared + 1
    assert compared >= 9


# ---- a device that is not there ----


@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_nothing_of_a_step_is_on_the_host(
    act: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill and steps on tensors that only say that they are on a GPU: the fakes of the ops
    refuse a length on the CPU, and whatever reads a value has none to read."""
    monkeypatch.setattr(backends, "implemented", lambda row, device: True)
    monkeypatch.setattr(backends, "_choices", {})
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    recorded: list[str] = []

    def record(step: Any, state: Any, device: torch.device, memory: Any) -> Any:
        recorded.append(str(device))
        assert all(tensor.device == device for tensor in state)
        return steps._Called(step)

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert self.device == source.device or (self.device.type, non_blocking) == ("cpu", True)
        return self

    def made(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(torch.tensor(values).shape, dtype=dtype, device=device)

    monkeypatch.setattr(steps, "record", record)
    # Without CUDA in torch, these two ask for a device guard or for pinned memory.
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(cache, "on_device", made)
    monkeypatch.setattr(steps, "on_device", made)
    checkpoint = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")

    with FakeTensorMode():
        weights: dict[str, Any] = {}
        for name, weight in checkpoint.weights.items():
            if isinstance(weight, torch.Tensor):
                weights[name] = there(weight)
            else:
                moved = {part: there(tensor) for part, tensor in weight.tensors().items()}
                weights[name] = replace(weight, **moved)
        decoder = QuantDecoder(
            replace(checkpoint, weights=weights), tokenizer=Letters(), act=act, kv_dtype=kv_dtype
        )
        assert decoder.dtype == torch.bfloat16
        assert decoder.kv_dtype == ("bfloat16" if kv_dtype == "auto" else "int4")
        assert decoder.decodes_on_device and decoder.uncaptured_because() is None
        assert "the weights are on cuda:0" in (decoder.composed_because() or "")
        running = decoder.steps()
        with running.alone() as pages:
            handles = [pages.add() for _ in range(3)]
        logits = running.forward([(handle, [1, 2, 3]) for handle in handles], True)
        assert (logits.shape, logits.dtype, logits.device.type) == ((3, 128), torch.float32, "cuda")
        for penalty in (1.0, 1.2):
            requests = [
                Request(i, [1, 2, 3, 4], 3, None, handle)  # type: ignore[arg-type]
                for i, handle in enumerate(handles)
            ]
            sampler = Sampler(GenerationSettings(repetition_penalty=penalty, temperature=0.5))
            with running.turn():
                running._load(requests, sampler)
                launched = running._launch(tuple(handles), sampler)
            assert launched.tokens.device.type == "cpu" and launched.arrived is event
        assert recorded == ["cuda:0"] * 2


def test_lengths_on_the_cpu_are_refused() -> None:
    """What a GPU's kernels say of lengths that the host still has."""
    with FakeTensorMode():
        q = torch.empty(1, 4, 64, dtype=torch.bfloat16, device="cuda:0")
        pages = torch.empty(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda:0")
        start, length = torch.tensor([0, 1]).int(), torch.tensor([1]).int()
        table = torch.empty(1, 2, dtype=torch.int32, device="cuda:0")
        with pytest.raises(RuntimeError, match="query_start is on cpu, but q is on cuda:0"):
            torch.ops.qkernels.attention(
                q, start, length, table, pages, pages, None, None, 0.1, True, 0, 0.0
            )
        assert ops.attention  # the op above is its kernel
