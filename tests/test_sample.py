"""sample on every instruction set: the same token as the reference, and the right distribution."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels.reference.sample import kept, philox

REFERENCE = torch.ops.qkernels_reference


def settings(batch, generator, *, temperature=None, top_k=None, top_p=None, min_p=None):
    """The arguments of a batch: what is given for all rows, else random, filters off in half of the rows."""

    def floats(value, low, high, off):
        if value is not None:
            return torch.full((batch,), value)
        drawn = torch.rand(batch, generator=generator) * (high - low) + low
        return torch.where(torch.rand(batch, generator=generator) < 0.5, drawn, torch.tensor(off))

    ks = torch.randint(0, 60, (batch,), generator=generator, dtype=torch.int32)
    return (
        floats(temperature, 0.2, 3.0, 1.0),
        ks if top_k is None else torch.full((batch,), top_k, dtype=torch.int32),
        floats(top_p, 0.0, 1.0, 1.0),
        floats(min_p, 0.0, 0.3, 0.0),
        torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        torch.randint(0, 2**40, (batch,), generator=generator),
    )


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32-10."""
    assert philox(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("vocab", [1, 2, 7, 100, 1031, 50257])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_token_of_the_reference(isa, vocab, spread, generator):
    batch = 6 if vocab > 10000 else 24
    logits = torch.randn(batch, vocab, generator=generator) * spread
    logits[1::3] = (logits[1::3] * 2).round() / 2  # ties
    logits[2::3, ::3] = -torch.inf
    logits[2::3, -1] = 0.0
    args = settings(batch, generator)
    assert torch.equal(isa.ops.sample(logits, *args), REFERENCE.sample(logits, *args))


def test_extremes(isa, generator):
    logits = torch.randn(9, 300, generator=generator)
    logits[0] = 0.0
    logits[1] = 3e38
    logits[1, ::2] = -3e38  # max - min is infinite
    logits[2, 17] = torch.inf
    logits[3] = torch.where(torch.arange(300) == 150, 0.0, -torch.inf)
    logits[4] = torch.where(torch.arange(300) % 2 == 0, 0.0, -0.0)
    temperature, top_k, top_p, min_p, seed, offset = settings(9, generator, temperature=1.0)
    temperature[5], temperature[6], temperature[7] = 1e-40, 3e38, 1e-3
    top_k[8] = 300
    for k in (0, 1, 5, 299, 2**31 - 1):
        args = (temperature, torch.full_like(top_k, k), top_p, min_p, seed, offset)
        got = isa.ops.sample(logits, *args)
        assert torch.equal(got, REFERENCE.sample(logits, *args))
        assert got[2] == 17 and got[3] == 150 and got[1] % 2 == 1
        assert got[5] == logits[5].argmax()  # so cold that only the largest is left


def test_greedy_takes_the_first_of_equal_logits(isa):
    logits = torch.zeros(4, 100)
    logits[0, [30, 60, 99]] = 1.0
    logits[1, 99] = 1e-30
    logits[2] = -5.0
    logits[3, 0], logits[3, 50] = -0.0, 0.0
    args = settings(4, torch.Generator().manual_seed(0), temperature=0.0)
    assert isa.ops.sample(logits, *args).tolist() == [30, 99, 0, 0]
    assert REFERENCE.sample(logits, *args).tolist() == [30, 99, 0, 0]


# Draws are fixed by their seeds: the statistic is a constant of the code, far inside what chance would give it.
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9, "min_p": 0.02}])
def test_the_distribution(isa, filters, generator):
    vocab, draws, temperature = 40, 40_000, 0.7
    row = torch.randn(vocab, generator=generator) * 1.5
    probs = torch.softmax(row.double() / temperature, 0)
    top_k, top_p, min_p = filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)
    # What transformers' warpers leave, one after the other.
    order = probs.argsort(descending=True)
    keep = torch.ones(vocab, dtype=torch.bool)
    if top_k:
        keep[order[top_k:]] = False
        probs = torch.where(keep, probs, 0) / probs[keep].sum()
    above = torch.cat([torch.zeros(1), probs[order].cumsum(0)[:-1]])
    keep[order[above >= top_p]] = False
    keep &= probs >= min_p * probs.max()
    probs = torch.where(keep, probs, 0) / probs[keep].sum()

    tokens = isa.ops.sample(
        row.expand(draws, vocab), torch.full((draws,), temperature), torch.full((draws,), top_k, dtype=torch.int32),
        torch.full((draws,), top_p), torch.full((draws,), min_p),
        torch.full((draws,), 1234), torch.arange(draws),
    )  # fmt: skip
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert not counts[~keep].any()
    expected = draws * probs[keep]
    pooled = expected >= 5
    o, e = counts[keep][pooled], expected[pooled]
    if not pooled.all():
        o, e = torch.cat([o, counts[keep][~pooled].sum()[None]]), torch.cat([e, expected[~pooled].sum()[None]])
    chi2, freedom = ((o - e).square() / e).sum().item(), len(o) - 1
    assert freedom > 0 and chi2 < freedom + 4 * (2 * freedom) ** 0.5, f"chi^2 = {chi2} with {freedom} degrees of freedom"


def test_filters_are_those_of_transformers(generator):
    """Without ties the same tokens are kept; `kept` is what every implementation is held to."""
    logits_process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    for _ in range(30):
        row = torch.randn(500, generator=generator) * 4
        t, p, m = (torch.rand(3, generator=generator) * torch.tensor([2.0, 1.0, 0.2]) + torch.tensor([0.1, 0.0, 0.0])).tolist()
        k = int(torch.randint(1, 100, (), generator=generator))
        scores = row[None]
        for warp in (
            logits_process.TemperatureLogitsWarper(t),
            logits_process.TopKLogitsWarper(k),
            logits_process.TopPLogitsWarper(p),
            logits_process.MinPLogitsWarper(m),
        ):
            scores = warp(None, scores)
        keep, _ = kept(row, t, k, p, m)
        assert torch.equal(keep, scores[0] != -torch.inf)


def test_reproducible_across_teams_and_batches(isa, with_threads, generator):
    logits = torch.randn(12, 5000, generator=generator) * 3
    args = settings(12, generator)
    alone = torch.cat([isa.ops.sample(logits[b : b + 1], *(a[b : b + 1] for a in args)) for b in range(12)])
    for threads in (1, 2, 3):
        with_threads(threads)
        assert torch.equal(isa.ops.sample(logits, *args), alone)


def test_rows_any_stride_apart(isa, generator):
    logits = torch.randn(6, 3, 1000, generator=generator)
    args = settings(6, generator)
    assert torch.equal(isa.ops.sample(logits[:, -1], *args), isa.ops.sample(logits[:, -1].contiguous(), *args))


def test_no_rows(isa, generator):
    tokens = isa.ops.sample(torch.empty(0, 10), *settings(0, generator))
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_nan_and_empty_rows_are_named(isa, generator):
    for ops in (isa.ops, REFERENCE):
        for temperature in (0.0, 1.0):
            args = settings(3, generator, temperature=temperature)
            logits = torch.zeros(3, 70)
            logits[1] = -torch.inf
            with pytest.raises(RuntimeError, match="sample: logits of row 1 are all -inf"):
                ops.sample(logits, *args)
            for place in (0, 33, 69):
                logits = torch.zeros(3, 70)
                logits[2, place] = torch.nan
                with pytest.raises(RuntimeError, match="sample: logits of row 2 have a NaN"):
                    ops.sample(logits, *args)


def test_bad_arguments_raise_alike(generator):
    logits = torch.randn(2, 50)
    good = settings(2, generator)

    def but(**changes):
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "offset")
        return tuple(changes.get(name, value) for name, value in zip(names, good, strict=True))

    cases = [
        (logits.half(), good, "logits must be float32, got float16"),
        (logits[0], good, "logits must have 2 dimensions"),
        (logits.T.contiguous().T, good, "logits must be dense in its last dimension"),
        (logits[:, :0], good, "logits must have 1 to 4194304 columns"),
        (logits, but(top_k=good[1].long()), "top_k must be int32, got int64"),
        (logits, but(seed=good[4][:1]), r"seed must be \[2\], got \[1\]"),
    ]
    values = [
        (but(temperature=torch.tensor([1.0, -1.0])), "temperature must be finite and not negative, got -1 in row 1"),
        (but(temperature=torch.tensor([torch.nan, 1.0])), "temperature must be finite and not negative, got nan in row 0"),
        (but(temperature=torch.tensor([torch.inf, 1.0])), "temperature must be finite and not negative, got inf in row 0"),
        (but(top_k=torch.tensor([-1, 0], dtype=torch.int32)), r"top_k must not be negative \(0 is off\), got -1 in row 0"),
        (but(top_p=torch.tensor([0.5, 1.5])), r"top_p must be from 0 to 1 \(1 is off\), got 1.5 in row 1"),
        (but(min_p=torch.tensor([0.5, torch.nan])), r"min_p must be from 0 to 1 \(0 is off\), got nan in row 1"),
    ]
    for tensor, args, message in cases:
        meta = [t.to("meta") for t in (tensor, *args)]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qkernels.sample(*meta)
    for tensor, args, message in [*cases, *((logits, *v) for v in values)]:
        for ops in (torch.ops.qkernels, REFERENCE):
            with pytest.raises(RuntimeError, match=message):
                ops.sample(tensor, *args)


def test_opcheck_and_compile(generator):
    logits = torch.randn(3, 100, generator=generator)
    torch.library.opcheck(torch.ops.qkernels.sample.default, (logits, *settings(3, generator)))

    def draw(logits):
        return qk.ops.sample(logits, temperature=0.8, top_k=10, top_p=0.9, seed=3, offset=7)

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(logits), draw(logits))
