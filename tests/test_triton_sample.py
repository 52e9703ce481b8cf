"""sample in Triton: the token of the CPU's kernels, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gpus import Gpu, triton_gpu
from test_cuda_sample import (  # noqa: F401
    assert_same_tokens,
    test_extremes,
    test_greedy_takes_the_first_of_equal_logits,
    test_nan_and_empty_rows_have_numbers,
    test_neighbours_in_float32_are_told_apart,
    test_no_rows,
    test_rows_any_stride_apart,
    test_settings_out_of_range_draw_some_token,
    test_weights_are_exact_to_the_last_float,
)
from test_sample import settings

# Interpreted, they are numpy's warnings of logits that are infinite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


# One tile and several; more logits than a list holds; 50,257 is a vocabulary.
@pytest.mark.parametrize(
    ("vocab", "spread"),
    [(1, 3.0), (2, 3.0), (31, 3.0), *product([1031, 8192], [0.1, 3.0, 30.0]), (50257, 3.0)],
)
def test_the_token_of_the_cpu(
    gpu: Gpu, vocab: int, spread: float, generator: torch.Generator
) -> None:
    logits = torch.randn(3, vocab, generator=generator) * spread
    logits[1] = (logits[1] * 2).round() / 2  # ties
    logits[2, ::3] = -torch.inf
    logits[2, -1] = 0.0
    assert_same_tokens(gpu, logits, settings(3, generator))
    top_k = max(1, vocab // 3)  # no filter off
    args = settings(3, generator, temperature=0.9, top_k=top_k, top_p=0.7, min_p=0.01)
    assert_same_tokens(gpu, logits, args)


@pytest.mark.parametrize("kind", ["equal", "two values", "outlier", "steep", "masked"])
def test_more_logits_in_a_bracket_than_are_listed(
    gpu: Gpu, kind: str, generator: torch.Generator
) -> None:
    vocab = 9000
    logits = torch.zeros(1, vocab)
    if kind == "two values":
        logits[:, ::2] = 1.0
    elif kind == "outlier":
        logits = torch.randn(1, vocab, generator=generator) * 0.01
        logits[:, 1234] = -20.0
    elif kind == "steep":
        logits = torch.randn(1, vocab, generator=generator) * 1e4
    elif kind == "masked":  # fewer are left than top-k would keep
        logits = torch.full((1, vocab), -torch.inf)
        logits[:, 4000:8500] = torch.randn(4500, generator=generator)
    for top_k, top_p in ((5000, 1.0), (0, 0.6), (5000, 0.6)):
        args = settings(1, generator, temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0)
        assert_same_tokens(gpu, logits, args)


def test_temperatures_and_shares(gpu: Gpu, generator: torch.Generator) -> None:
    shares = [0.0, 1e-6, 0.5, 0.999999, 1.0]
    rows = list(product([0.05, 0.3, 1.0, 100.0], shares, [0, 1, 50]))
    logits = torch.randn(len(rows), 700, generator=generator) * 4
    _, _, _, min_p, seed, offset = settings(len(rows), generator)
    temperature, top_p, top_k = (torch.tensor(values) for values in zip(*rows, strict=True))
    args = (temperature, top_k.int(), top_p, min_p, seed, offset)
    assert_same_tokens(gpu, logits, args)


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    logits, *args = gpu.to([torch.randn(1, 50, generator=generator), *settings(1, generator)])
    torch.library.opcheck(gpu.ops.sample.default, (logits, *args))

    def draw(logits: torch.Tensor) -> torch.Tensor:
        return gpu.ops.sample(logits, *args)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), draw(logits))
