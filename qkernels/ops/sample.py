"""One token per row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from . import checks
from .registry import define

MAX_VOCAB = 1 << 22  # that many weights of at most 2^40 sum to less than 2^63
NAN, EMPTY = -1, -2  # what is not a token: kSampleNan and kSampleEmpty of csrc/args.h


def check_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> None:
    if logits.dtype != torch.float32:
        checks.fail("sample", f"logits must be float32, got {checks.type_name(logits.dtype)}")
    checks.rows("sample", "logits", logits)
    batch, vocab = logits.shape
    if not 1 <= vocab <= MAX_VOCAB:
        checks.fail(
            "sample", f"logits must have 1 to {MAX_VOCAB} columns, got {list(logits.shape)}"
        )
    checks.expect("sample", "temperature", temperature, torch.float32, [batch])
    checks.expect("sample", "top_k", top_k, torch.int32, [batch])
    checks.expect("sample", "top_p", top_p, torch.float32, [batch])
    checks.expect("sample", "min_p", min_p, torch.float32, [batch])
    checks.expect("sample", "seed", seed, torch.int64, [batch])
    checks.expect("sample", "offset", offset, torch.int64, [batch])
    checks.same_device(
        "sample", "logits", logits.device,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, offset=offset,
    )  # fmt: skip


def _fake(*args: Any) -> Tensor:
    check_sample(*args)
    return args[0].new_empty((args[0].shape[0],), dtype=torch.int64)


define(
    "sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
    "Tensor offset) -> Tensor",
    fake=_fake,
    reference=checks.checked(check_sample, reference.sample),
)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    offset: int | Tensor,
) -> Tensor:
    """Draws one token per row: temperature, then top-k, top-p and min-p, in the order of
    transformers.

    logits [B, V] float32, rows dense; the others a number for all rows, or a tensor [B] (top_k
    int32, seed and offset int64, else float32) -> tokens [B] int64. temperature 0: the largest
    logit, the first of equal ones. top_k 0, top_p 1 and min_p 0 are off.

    The same logits, seed and offset give the same token on every device, instruction set and number
    of threads: in each row e = exp((l - max) / temperature) by fixed float32 operations, and its
    weight w = round(e * 2^40) is an integer. top-k keeps the tokens that fewer than k logits
    exceed, top-p those whose greater tokens weigh less than p of what top-k kept (or nothing),
    min-p those with e >= min_p; equal logits share their fate. With u the first two words of
    Philox4x32-10 (key: seed, counter: offset; the first word is the low half) and S the weight that
    is left, the token is the first at which the cumulative weight, in the order of ids, exceeds
    floor(u * S / 2^64). Draws of one sequence take one seed and offsets 0, 1, 2, ...

    Raises RuntimeError for other shapes and dtypes, and on the CPU for a temperature, top_k, top_p
    or min_p out of range and for a row that has a NaN or nothing but -inf. A GPU would have to be
    waited for: there a setting out of range is not noticed, and such a row gives -1 (NaN) or -2
    (-inf), which `check_tokens` reports once tokens are read.
    """
    batch = logits.shape[0] if logits.dim() == 2 else 1

    def per_row(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        return (
            value
            if isinstance(value, Tensor)
            else torch.full((batch,), value, dtype=dtype, device=logits.device)
        )

    return select("sample", logits.device)(
        logits,
        per_row(temperature, torch.float32),
        per_row(top_k, torch.int32),
        per_row(top_p, torch.float32),
        per_row(min_p, torch.float32),
        per_row(seed, torch.int64),
        per_row(offset, torch.int64),
    )


def check_tokens(tokens: Sequence[int]) -> None:
    """Raises RuntimeError, as `sample` does on the CPU, if a row of logits gave no token."""
    for row, token in enumerate(tokens):
        if token == NAN:
            checks.fail("sample", f"logits of row {row} have a NaN")
        if token == EMPTY:
            checks.fail("sample", f"logits of row {row} are all -inf")
