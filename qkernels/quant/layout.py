"""The packed layout, in PyTorch: the same definition as csrc/layout.h, which tests/test_layout.py holds equal to it.

The unit is 64 rows x 16 columns and 128 * bits bytes; the units of a 64-row block are contiguous along K, the blocks
along N. A unit is one or two planes of 8, 4, 2 or 1 bits of every code, the lower bits first. With
row = 32 q + 16 h + 4 c + 2 f + e (q, h, f, e < 2, c < 4) and column = 4 t + j (t, j < 4), the bytes of a plane run over

    8 bits   h q t c f e j         4 bits   q t c f e j, slots h
    2 bits   q t c f j, slots e h  1 bit    q t c j, slots f e h

where the slots of a byte count from its low end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import BLOCK, round_up

UNIT_ROWS, UNIT_COLS = 64, 16

# Planes of a code: (width, shift of its bits in the code), in storage order.
PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    8: ((8, 0),),
    6: ((4, 0), (2, 4)),
    5: ((4, 0), (1, 4)),
    4: ((4, 0),),
    3: ((2, 0), (1, 2)),
    2: ((2, 0),),
}

# A block of codes viewed as [n, q, h, c, f, e, u, t, j] (n: blocks along N, u: units along K), per width the order of
# those axes in memory, and how many trailing ones are slots of a byte.
_VIEW = "nqhcfeutj"
_SIZES = {"q": 2, "h": 2, "c": 4, "f": 2, "e": 2, "t": 4, "j": 4}
_ORDER = {8: ("nuhqtcfej", 0), 4: ("nuqtcfejh", 1), 2: ("nuqtcfjeh", 2), 1: ("nuqtcjfeh", 3)}


def padded_k(k: int, group: int, two_level: bool) -> int:
    return round_up(k, BLOCK if two_level else group)


def padded_n(n: int) -> int:
    return round_up(n, UNIT_ROWS)


def pack(codes: Tensor, bits: int, group: int, two_level: bool) -> Tensor:
    """codes [N, K] uint8, each below 2^bits -> [Np, Kp * bits / 8] int8, padded with zeros. Any device."""
    n, k = codes.shape
    np, kp = padded_n(n), padded_k(k, group, two_level)
    padded = torch.nn.functional.pad(codes, (0, kp - k, 0, np - n))
    view = padded.view(np // UNIT_ROWS, *(_SIZES[a] for a in "qhcfe"), kp // UNIT_COLS, 4, 4)
    planes = []
    for width, shift in PLANES[bits]:
        order, slots = _ORDER[width]
        part = ((view >> shift) & ((1 << width) - 1)).permute([_VIEW.index(a) for a in order])
        part = part.reshape(np // UNIT_ROWS, kp // UNIT_COLS, -1, 1 << slots)
        byte = part[..., 0].clone()
        for slot in range(1, 1 << slots):
            byte |= part[..., slot] << (width * slot)
        planes.append(byte)
    return torch.cat(planes, dim=-1).view(torch.int8).reshape(np, kp * bits // 8)


def unpack(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """[Np, Kp * bits / 8] int8 -> codes [n, k] uint8, the inverse of `pack`. Any device."""
    np = packed.shape[0]
    kp = packed.shape[1] * 8 // bits
    units = packed.reshape(np // UNIT_ROWS, kp // UNIT_COLS, 128 * bits).view(torch.uint8)
    codes: Tensor | None = None
    start = 0
    for width, shift in PLANES[bits]:
        order, slots = _ORDER[width]
        size = UNIT_ROWS * UNIT_COLS * width // 8
        plane = units[..., start : start + size]
        start += size
        parts = [(plane >> (width * slot)) & ((1 << width) - 1) for slot in range(1 << slots)]
        sizes = {**_SIZES, "n": np // UNIT_ROWS, "u": kp // UNIT_COLS}
        part = torch.stack(parts, dim=-1).view([sizes[a] for a in order])
        part = part.permute([order.index(a) for a in _VIEW]).reshape(np, kp)
        codes = part if codes is None else codes | (part << shift)
    assert codes is not None
    return codes[:n, :k].contiguous()


def pack_groups(values: Tensor, groups: int) -> Tensor:
    """Scales, zeros or minima of groups, [N, G] of any dtype -> [Np/64, groups, 64], padded with zero bytes."""
    n, g = values.shape
    np = padded_n(n)
    out = torch.zeros(np // UNIT_ROWS, groups, UNIT_ROWS, dtype=_plain(values.dtype), device=values.device)
    raw = torch.nn.functional.pad(values.contiguous().view(out.dtype), (0, 0, 0, np - n))
    out[:, :g] = raw.view(np // UNIT_ROWS, UNIT_ROWS, g).transpose(1, 2)
    return out.view(values.dtype)


def unpack_groups(packed: Tensor, n: int, g: int) -> Tensor:
    """[Np/64, groups, 64] -> [n, g], the inverse of `pack_groups`."""
    raw = packed.view(_plain(packed.dtype)).transpose(1, 2).reshape(-1, packed.shape[1])
    return raw[:n, :g].contiguous().view(packed.dtype)


def _plain(dtype: torch.dtype) -> torch.dtype:
    """An integer dtype of the same size, for which torch can pad and copy."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
