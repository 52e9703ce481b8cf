"""Programs that take rows and give rows, as a host with layers of ours runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_program import DIM, HIDDEN, KV_HEADS, SPECS, VOCAB, lowered_for, model

from qkernels import ops
from qkernels.cache import PagedKVCache
from qkernels.nn.executor import ComposedExecutor, NativeExecutor
from qkernels.nn.program import Embed, Linear, Norm, Output, Select, hidden_program, layer_programs
from qkernels.quant import PackedWeight


def cache() -> PagedKVCache:
    return PagedKVCache(2, KV_HEADS, DIM, dtype="float16", page_size=16, max_tokens=512)


@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rows_through_the_layers_are_those_before_the_last_norm(
    act: str, qk_norm: bool, with_threads: Callable[[int], None]
) -> None:
    steps, weights = model(SPECS["w4-min"], qk_norm=qk_norm)
    table = weights["embed"]
    assert isinstance(table, PackedWeight)
    whole = ComposedExecutor(lowered_for(steps, weights, act), weights)
    hidden = lowered_for(hidden_program(steps, HIDDEN), weights, act)
    executors = [ComposedExecutor(hidden, weights), NativeExecutor(hidden, weights)]
    head = lowered_for(
        [Norm("f", "r", "final"), Select("s", "f"), Linear("logits", "s", "embed")], weights, act
    )
    for threads in (1, 2, 3):
        with_threads(threads)
        caches = [cache() for _ in range(3)]
        seqs = [[c.add(), c.add()] for c in caches]
        for counts in ([5, 19], [1, 1], [1, 0], [0, 1]):  # the last are single tokens
            ids = (torch.arange(sum(counts)) * 31 + len(counts)) % VOCAB
            rows = ops.embedding(ids, table, torch.float32, multiplier=1.5)
            batches = [c.reserve(s, counts) for c, s in zip(caches, seqs, strict=True)]
            some = torch.arange(sum(counts)).flip(0)
            logits = whole(ids, batches[0], some, caches[0])
            outs = [
                execute(rows, batch, some, c)
                for execute, batch, c in zip(executors, batches[1:], caches[1:], strict=True)
            ]
            assert outs[0].shape == (sum(counts), HIDDEN) and outs[0].isfinite().all()
            assert torch.equal(*outs)
            # The norm and the head after them.
            after = ComposedExecutor(head, weights)
            floats, acts = {"r": outs[0]}, {}
            for step in after.steps:
                after._run(step, floats, acts, ids, batches[0], None, caches[0])
            assert torch.equal(floats["logits"], logits)


def test_programs_of_another_form_are_refused() -> None:
    steps, _ = model(SPECS["w4-min"])
    with pytest.raises(ValueError, match="expected an embedding, layers, and a norm"):
        hidden_program(steps[1:], HIDDEN)
    with pytest.raises(ValueError, match="expected an embedding, layers, and a norm"):
        hidden_program(steps[:-1], HIDDEN)
    named = [
        Embed("h", "embed.weight"),
        Linear("r", "h", "layers.0.q.weight"),
        Norm("f", "r", "norm.weight", add="h"),
        Select("s", "f"),
        Linear("logits", "s", "embed.weight"),
    ]
    with pytest.raises(ValueError, match="expected layer 0 to begin with the norm"):
        layer_programs(named, HIDDEN)


class TestPlans:
    # Registers 0 .. 3 are 32 wide, 4 is 64, 5 is quantized.
    INPUT, OUTPUT = (10, 0), (11, 2, 0, 1)
    NORM = (2, 1, 0, 0, -1, -1, 0, 0, 0)

    def plan(self, *steps: tuple[int, ...]) -> int:
        return torch.ops.qkernels.decoder_plan(
            [torch.ones(32)],
            [*[32, 0] * 4, 64, 0, 32, 32],
            [n for step in steps for n in step],
            [1e-5],
        )

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([INPUT, NORM], "the last step must be a linear .the head. or an output"),
            ([INPUT, INPUT, NORM, OUTPUT], "a program has one embedding, or one input"),
            ([INPUT, NORM, OUTPUT, (2, 3, *NORM[2:])], "the last step must be"),
            ([INPUT, NORM, (11, 3, 0, 1), OUTPUT], "an output must be the last step"),
            ([INPUT, OUTPUT], "register 1 is read before it is written"),
            ([INPUT, (11, 0, 0, -1)], "output needs a register of its own"),
            ([INPUT, (11, 4, 0, -1)], "output must be 32 wide, got a register of 64"),
            ([(10, 5)], "the input must be a float register"),
            ([(10, 9)], "register 9 is not among the 6"),
            ([INPUT, (7, 3, 0), (11, 2, 3, -1)], "output must come before select"),
        ],
    )
    def test_a_plan_that_is_none_is_refused(self, steps, message) -> None:
        with pytest.raises(RuntimeError, match=f"qkernels::decoder_plan: .*{message}"):
            self.plan(*steps)


def test_steps_take_rows_only_where_the_program_has_an_input() -> None:
    steps, weights = model(SPECS["w4-min"])
    execute = NativeExecutor(lowered_for(hidden_program(steps, HIDDEN), weights, "int8"), weights)
    c = cache()
    batch = c.reserve([c.add()], [2])
    for rows, message in (
        (torch.zeros(2, dtype=torch.int64), "ids must be float32, got int64"),
        (torch.zeros(2, HIDDEN + 1), rf"ids must be .*{HIDDEN}.*got .*{HIDDEN + 1}"),
        (torch.zeros(2, HIDDEN, dtype=torch.float64), "ids must be float32, got float64"),
    ):
        with pytest.raises(RuntimeError, match=f"qkernels::decoder_step: {message}"):
            execute(rows, batch, torch.arange(2), c)
    with pytest.raises(RuntimeError, match=r"select\[0\] = 2 is not a row of the 2 tokens"):
        execute(torch.zeros(2, HIDDEN), batch, torch.tensor([2]), c)
    assert execute(torch.ones(2, HIDDEN), batch, torch.arange(0), c).shape == (0, HIDDEN)
    assert isinstance(hidden_program(steps, HIDDEN)[-1], Output)


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_fork_has_the_same_keys_in_pages_of_its_own(dtype: str) -> None:
    c = PagedKVCache(2, KV_HEADS, DIM, dtype=dtype, page_size=16, max_tokens=96)
    seq = c.add()
    c.reserve([seq], [21])
    for pages in (c.k_pages, c.v_pages, c.k_scale, c.v_scale):
        if pages is not None:
            pages[:, c.pages(seq)] = torch.randint(0, 100, pages[:, c.pages(seq)].shape).to(
                pages.dtype
            )
    copy = c.fork(seq)
    assert c.lengths[copy] == 21 and not {*c.pages(copy)} & {*c.pages(seq)}
    for pages in (c.k_pages, c.v_pages, c.k_scale, c.v_scale):
        if pages is not None:
            assert torch.equal(pages[:, c.pages(copy)], pages[:, c.pages(seq)])
    empty = c.fork(c.add())
    assert c.lengths[empty] == 0
    c.fork(seq)
    before = c.lengths
    with pytest.raises(RuntimeError, match=r"needs \d+ tokens of KV cache"):
        c.fork(seq)  # a fourth one does not fit
    assert c.lengths == before
    with pytest.raises(KeyError, match="no sequence 99"):
        c.fork(99)
