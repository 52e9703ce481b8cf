"""Sampling. Weights are integers and the draw is theirs alone, so that every implementation picks the same token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST = -29.0  # exp(-29) < 2^-41: its weight rounds to 0


def philox(seed: int, offset: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words.

    seed and offset as unsigned 64-bit integers: the key is (seed low, high), the counter (offset low, high, 0, 0).
    """
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = offset & low, offset >> 32 & low, 0, 0
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def exponentials(logits: Tensor, temperature: float) -> Tensor:
    """[V] float32 -> e = exp((l - max) / temperature), by the float32 operations that every implementation follows."""
    top = logits.max()
    d = torch.where(logits == top, 0.0, (logits - top) / temperature)
    x = d.clamp(min=LOWEST)
    n = torch.round(x * 1.44269504)
    r = x - n * 0.693145751953125
    r = r - n * 1.42860677e-6
    p = torch.full_like(r, 1.3888889e-3)
    for c in (8.3333333e-3, 4.1666667e-2, 1.6666667e-1, 0.5, 1.0, 1.0):
        p = p * r + c
    return torch.where(d < LOWEST, 0.0, torch.ldexp(p, n.to(torch.int32)))


def weights(e: Tensor) -> Tensor:
    """e in [0, 1] -> round half to even (e * 2^40), int64."""
    return torch.round(e.double() * 2.0**40).to(torch.int64)


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """[V] -> which tokens the filters leave, and the weights of all, [V] bool and int64; temperature > 0."""
    e = exponentials(logits, temperature)
    w = weights(e)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.numel():
        keep &= logits >= torch.topk(logits, top_k).values[-1]
    if top_p < 1.0:
        values, index = torch.unique(logits, sorted=True, return_inverse=True)
        mass = torch.zeros(values.numel(), dtype=torch.int64, device=logits.device)
        mass.index_add_(0, index, torch.where(keep, w, 0))
        total = int(mass.sum())
        above = total - mass.cumsum(0)
        keep &= ((above == 0) | (above.double() < top_p * float(total)))[index]
    return keep & (e >= min_p), w


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, offset: Tensor
) -> Tensor:
    """logits [B, V] and one value of the others per row -> [B] int64."""
    tokens = []
    for b, row in enumerate(logits):
        t, k, p, m = float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b])
        _check_row(b, row, t, k, p, m)
        if t == 0:
            tokens.append(int((row == row.max()).nonzero()[0]))
            continue
        keep, w = kept(row, t, k, p, m)
        cumulative = torch.where(keep, w, 0).cumsum(0)
        r0, r1, _, _ = philox(int(seed[b]), int(offset[b]))
        target = (r1 << 32 | r0) * int(cumulative[-1]) >> 64
        tokens.append(int((cumulative > target).nonzero()[0]))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _check_row(b: int, row: Tensor, t: float, k: int, p: float, m: float) -> None:
    def check(ok: bool, text: str) -> None:
        if not ok:
            raise RuntimeError(f"qkernels::sample: {text}")

    check(t >= 0 and math.isfinite(t), f"temperature must be finite and not negative, got {t:g} in row {b}")
    check(k >= 0, f"top_k must not be negative (0 is off), got {k} in row {b}")
    check(0 <= p <= 1, f"top_p must be from 0 to 1 (1 is off), got {p:g} in row {b}")
    check(0 <= m <= 1, f"min_p must be from 0 to 1 (0 is off), got {m:g} in row {b}")
    check(not bool(row.isnan().any()), f"logits of row {b} have a NaN")
    check(bool((row != -torch.inf).any()), f"logits of row {b} are all -inf")
