"""Settings, stop rules and the loop over a batch, on a stand-in for the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import ops
from qkernels.generate import (
    PREFILL_CHUNK,
    GenerationSettings,
    Loop,
    Request,
    Sampler,
    TextAssembler,
    TextStream,
    check_prompt,
    common_prefix,
)
from qkernels.int_buffer import IntBuffer
from qkernels.text import IncrementalDecoder

VOCAB = 64


class Words:
    """A tokenizer of fixed texts, one per token."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def push(self, token: int) -> str:
        return self.texts[token]

    def flush(self) -> str:
        return ""


class CountingPool:
    """A model whose next token is the sum of the sequence so far, modulo VOCAB; it checks what the
    loop feeds it.
    """

    def __init__(self) -> None:
        self.sequences: dict[int, list[int]] = {}
        self.calls: list[list[int]] = []
        self.freed: list[int] = []
        self.fail_at: int | None = None

    def add(self) -> int:
        handle = len(self.sequences) + len(self.freed)
        self.sequences[handle] = []
        return handle

    def free(self, handle: int) -> None:
        del self.sequences[handle]
        self.freed.append(handle)

    def forward(self, parts, last_only: bool) -> torch.Tensor:
        assert last_only and parts and all(ids for _, ids in parts)
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append([len(ids) for _, ids in parts])
        logits = torch.zeros(len(parts), VOCAB)
        for row, (handle, ids) in zip(logits, parts, strict=True):
            self.sequences[handle] += ids
            row[sum(self.sequences[handle]) % VOCAB] = 1.0
        return logits


def expected(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(ids) % VOCAB)
    return ids[len(prompt) :]


def request(index: int, prompt: list[int], stop: Sequence[str] = ()) -> Request:
    texts = [chr(ord("A") + i) for i in range(VOCAB)]
    return Request(index, list(prompt), len(prompt), TextAssembler(Words(texts), stop))


def run(prompts: list[list[int]], context: int = 4096, max_batch: int = 32, **changes):
    pool = CountingPool()
    requests = [request(i, prompt, changes.get("stop", ())) for i, prompt in enumerate(prompts)]
    loop = Loop(pool, requests, GenerationSettings(**changes), context, max_batch=max_batch)
    pieces = list(loop.run())
    return pool, requests, pieces, loop


@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=700), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_a_batch_gives_what_each_prompt_gives_alone(
    prompts: list[list[int]], count: int, max_batch: int
) -> None:
    pool, requests, _, loop = run(prompts, max_batch=max_batch, max_new_tokens=count)
    assert [r.new for r in requests] == [expected(prompt, count) for prompt in prompts]
    assert {r.finish for r in requests} == {"length"}
    assert not pool.sequences and sorted(pool.freed) == list(range(len(prompts)))
    assert max(sum(call) for call in pool.calls) <= PREFILL_CHUNK
    assert loop.timings.prefill_tokens == sum(map(len, prompts))
    assert loop.timings.decode_tokens == len(prompts) * (count - 1)


def test_finished_sequences_leave_the_batch() -> None:
    prompts = [[1, 2], [5]]
    eos = expected(prompts[0], 3)[2]
    assert eos not in expected(prompts[1], 8)
    pool, requests, _, _ = run(prompts, max_new_tokens=8, eos_ids=(eos,))
    assert [r.finish for r in requests] == ["eos", "length"]
    assert requests[0].new == expected(prompts[0], 3)  # with the token that ended it
    assert pool.calls == [[2, 1], [1, 1], [1, 1], [1], [1], [1], [1], [1]]


def test_eos_gives_no_text_and_can_be_ignored() -> None:
    eos = expected([1, 2], 2)[1]
    _, requests, pieces, _ = run([[1, 2]], max_new_tokens=5, eos_ids=(eos,))
    assert requests[0].finish == "eos" and [p.text for p in pieces] == [chr(ord("A") + 3), ""]
    _, requests, _, _ = run([[1, 2]], max_new_tokens=5, eos_ids=(eos,), stop_at_eos=False)
    assert requests[0].finish == "length" and requests[0].new == expected([1, 2], 5)


def test_generation_ends_when_the_context_is_full() -> None:
    pool, requests, _, _ = run([[1, 2, 3]], context=6, max_new_tokens=50)
    assert requests[0].finish == "length"
    assert sum(map(sum, pool.calls)) == 6  # every position of the context is used
    _, requests, _, _ = run([[1] * 6], context=6, max_new_tokens=50)
    assert len(requests[0].new) == 1


def test_interrupt_frees_every_sequence() -> None:
    pool = CountingPool()
    pool.fail_at = 3
    loop = Loop(pool, [request(0, [1]), request(1, [2])], GenerationSettings(), 100)
    with pytest.raises(KeyboardInterrupt):
        list(loop.run())
    assert not pool.sequences and sorted(pool.freed) == [0, 1]


def test_a_closed_stream_frees_its_sequence() -> None:
    pool, one = CountingPool(), request(0, [1])
    loop = Loop(pool, [one], GenerationSettings(), 100)
    stream = TextStream(one, loop, loop.run(), 0.0)
    assert next(stream) and pool.sequences
    stream.close()
    assert not pool.sequences and list(stream) == [] and stream.finish_reason is None


def test_stop_text_is_cut_off_and_ends_the_sequence() -> None:
    text = "".join(chr(ord("A") + t) for t in expected([1, 2], 6))
    _, requests, pieces, _ = run([[1, 2]], max_new_tokens=6, stop=(text[2:4],))
    assert requests[0].finish == "stop" and len(requests[0].new) == 4
    assert "".join(p.text for p in pieces) == text[:2]


@given(
    st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_part_of_a_stop_text_leaks(texts: list[str], stops: list[str]) -> None:
    assembler = TextAssembler(Words(texts), stops)
    shown, fed = "", ""
    for token in range(len(texts)):
        shown += assembler.push(token)
        fed += texts[token]
        at = [fed.find(stop) for stop in stops if stop in fed]
        assert assembler.stopped == bool(at)
        if at:
            assert shown == fed[: min(at)]
            break
        rest = fed[len(shown) :]
        assert fed.startswith(shown)
        assert rest == "" or any(stop.startswith(rest) for stop in stops)  # held back for a reason
    else:
        assert shown + assembler.finish() == fed


def test_incremental_decoder_never_breaks_a_character() -> None:
    data = "naïve 日本 🙂!".encode()
    decoder = IncrementalDecoder(lambda ids: bytes(ids).decode(errors="replace"))
    pieces = [decoder.push(byte) for byte in data]
    assert "".join(pieces) == data.decode() and "\ufffd" not in "".join(pieces)
    assert decoder.flush() == ""
    cut = IncrementalDecoder(lambda ids: bytes(ids).decode(errors="replace"))
    assembler = TextAssembler(cut, ())
    assert "".join(assembler.push(byte) for byte in "a🙂".encode()[:3]) + assembler.finish() == "a"


def test_penalty_lowers_what_occurred() -> None:
    class Pool(CountingPool):
        def forward(self, parts, last_only: bool) -> torch.Tensor:
            out = torch.full((1, VOCAB), -1.0)
            out[0, 5], out[0, 6] = 3.0, 2.0
            return out

    tokens = []
    for penalty in (1.0, 2.0):
        one = request(0, [5])
        list(
            Loop(
                Pool(), [one], GenerationSettings(max_new_tokens=1, repetition_penalty=penalty), 100
            ).run()
        )
        tokens += one.new
    assert tokens == [5, 6]


def test_sampling_is_repeatable_and_differs_by_prompt() -> None:
    class Flat(CountingPool):
        def forward(self, parts, last_only: bool) -> torch.Tensor:
            return torch.zeros(len(parts), VOCAB)

    def draw(seed: int | None, max_batch: int = 8) -> list[list[int]]:
        requests = [request(i, [1]) for i in range(3)]
        settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=seed)
        list(Loop(Flat(), requests, settings, 100, max_batch=max_batch).run())
        return [r.new for r in requests]

    first = draw(3)
    assert first == draw(3) == draw(3, max_batch=1)
    assert len({tuple(t) for t in first}) == 3 and first != draw(4)
    assert draw(None) != draw(None)


def test_draws_are_those_of_the_op_while_sequences_come_and_leave() -> None:
    """Request i draws token n with seed + i and offset n - 1, whatever is decoded beside it."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(512, VOCAB, generator=g) * 2
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}

    class Table(CountingPool):
        def forward(self, parts, last_only: bool) -> torch.Tensor:
            super().forward(parts, last_only)
            return torch.stack([table[sum(self.sequences[handle]) % 512] for handle, _ in parts])

    requests = [request(i, [i + 1] * (i + 1)) for i in range(5)]
    settings = GenerationSettings(max_new_tokens=40, seed=7, eos_ids=(1, 2, 3), **options)
    pool = Table()
    list(Loop(pool, requests, settings, 100, max_batch=3).run())
    assert len({len(r.new) for r in requests}) > 2  # they leave at different steps
    assert {1, 2, 3} <= set(map(len, pool.calls))
    for r in requests:
        for offset in range(r.new_count):
            logits = table[sum(r.ids[: r.prompt + offset]) % 512][None]
            drawn = ops.sample(logits, **options, seed=7 + r.index, offset=offset)
            assert drawn.tolist() == [r.new[offset]]


@pytest.mark.parametrize(
    ("token", "said"), [(-1, "logits of row 1 have a NaN"), (-2, "logits of row 1 are all -inf")]
)
def test_a_row_without_a_token_is_named(
    token: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that nobody waits for gives such a row a number that is no token."""

    def select(op: str, device: torch.device) -> Any:
        return lambda logits, *_: torch.tensor([0, token, 2])

    monkeypatch.setattr("qkernels.generate.select", select)
    sampler = Sampler(GenerationSettings())
    with pytest.raises(RuntimeError, match=f"qkernels::sample: {said}"):
        sampler(torch.zeros(3, VOCAB), [request(i, [1]) for i in range(3)])


@pytest.mark.parametrize(("dtype", "large"), [(torch.int32, 2**31 - 1), (torch.int64, 2**63 - 1)])
def test_int_buffer(dtype: torch.dtype, large: int) -> None:
    buffer = IntBuffer(3, dtype)
    tensor = buffer.write([1, -2, large])
    assert tensor.dtype == dtype and tensor.tolist() == [1, -2, large]
    assert buffer.write((4, 5, 6)) is tensor and tensor.tolist() == [4, 5, 6]
    for values in ([1, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"expected 3 integers, got {len(values)}"):
            buffer.write(values)
    with pytest.raises(OverflowError):
        buffer.write([0, 0, large + 1])
    assert tensor.tolist() == [4, 5, 6]
    empty = IntBuffer(0, dtype).write([])
    assert empty.shape == (0,) and empty.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": -3}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ({"temperature": -0.1}, ValueError, "temperature must be at least 0, got -0.1"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"top_k": -1}, ValueError, "top_k must be from 0"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": 1.5}, ValueError, "min_p must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be above 0"),
        ({"seed": -1}, ValueError, "seed"),
        ({"stop": ["a", ""]}, ValueError, "stop must be texts that are not empty"),
        ({"stop": 5}, TypeError, "stop must be a text or a list of texts, got 5"),
        ({"stop": None}, TypeError, "stop must be a text or a list of texts, got None"),
        ({"eos_ids": 7}, TypeError, "eos_ids must be a list of ids, got 7"),
        ({"stop_at_eos": 1}, TypeError, "stop_at_eos must be a bool"),
        ({"eos_ids": (-1,)}, ValueError, "eos_ids must be token ids"),
        ({"beams": 4}, TypeError, "unknown generation settings beams; there are max_new_tokens"),
    ],
)
def test_settings_out_of_range(changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GenerationSettings().updated(**changes)


def test_defaults_of_the_model() -> None:
    assert GenerationSettings.from_generation_config({}) == GenerationSettings()
    greedy = GenerationSettings.from_generation_config({"temperature": 0.6, "eos_token_id": 7})
    assert greedy.temperature == 0.0 and greedy.eos_ids == (7,)
    raw = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "eos_token_id": [7, 8],
    }
    sampling = GenerationSettings.from_generation_config(raw)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.eos_ids) == (
        0.6,
        0.9,
        0,
        (7, 8),
    )
    assert sampling.updated(stop="x").stop == ("x",)
    with pytest.raises(ValueError, match="generation_config of the model: temperature"):
        GenerationSettings.from_generation_config({"do_sample": True, "temperature": -1.0})


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([], ValueError, "empty prompt"),
        ([1, 64], ValueError, r"token id 64 at position 1 is outside the vocabulary \[0, 64\)"),
        ([-1], ValueError, "token id -1"),
        ([1.5], TypeError, "token 0 must be an integer, got 1.5"),
        ([True], TypeError, "token 0"),
        ([1] * 11, ValueError, "11 tokens exceed the context of 10 tokens"),
    ],
)
def test_bad_prompts(ids: list, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_prompt(ids, VOCAB, 10)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2 and common_prefix([], [1]) == 0
