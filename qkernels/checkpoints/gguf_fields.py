"""Taking fields and planes of bits out of GGUF blocks, for thousands of blocks in one numpy call.

Everywhere, raw is [rows, B, nbytes] uint8: B blocks of every row, possibly read-only, never
modified.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Plain(NamedTuple):
    """The arrays of a `PlainWeight` that a decoder fills, in the dtypes of its spec; float8 is
    uint8. All contiguous."""

    codes: np.ndarray  # [rows, B, elements of a block] uint8
    scale: np.ndarray  # [rows, B, groups of a block]
    zero: np.ndarray | None = None  # as scale
    block_scale: np.ndarray | None = None  # [rows, B] float16
    block_zero: np.ndarray | None = None  # [rows, B] float16

    def rows(self, start: int, stop: int) -> Plain:
        """Rows start..stop, as views."""
        return Plain(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]


def field(raw: np.ndarray, offset: int, size: int) -> np.ndarray:
    """[rows, B] view of `size` opaque bytes per block. Copying whole fields, instead of slicing
    bytes, saves numpy an inner loop of a few elements per block."""
    block = np.dtype(
        {"names": ["f"], "formats": [f"V{size}"], "offsets": [offset], "itemsize": raw.shape[-1]}
    )
    return raw.view(block)["f"][..., 0]


def copied(raw: np.ndarray, offset: int, dtype: str, count: int = 1) -> np.ndarray:
    """[rows, B] numbers of `dtype` at `offset`, or [rows, B, count] of them, in memory of their
    own."""
    size = np.dtype(dtype).itemsize * count
    out = np.empty(raw.shape[:2], np.dtype(f"V{size}"))
    out[...] = field(raw, offset, size)
    return out.view(dtype).reshape(*raw.shape[:2], *((count,) if count > 1 else ()))


def take_half(raw: np.ndarray, offset: int, out: np.ndarray | None) -> None:
    """Copies the float16 at `offset` of each block to out [rows, B] or [rows, B, 1]."""
    assert out is not None
    out.reshape(raw.shape[:2]).view("V2")[...] = field(raw, offset, 2)


@lru_cache(maxsize=64)
def _shifts(unit: int, width: int, count: int) -> np.ndarray:
    """[count] uint64: by how much each word of a row moves to the right in `spread`."""
    pattern = np.repeat(np.arange(0, 8, width, dtype=np.uint64), unit // 8)
    shifts = np.tile(pattern, count // len(pattern))
    shifts.flags.writeable = False
    return shifts


def spread(raw: np.ndarray, offset: int, unit: int, width: int, out: np.ndarray) -> np.ndarray:
    """Unpacks a plane of `width` bits per code, the way ggml stores most of them.

    The stored bytes, from `offset` on, come in units of `unit` bytes; a unit holds 8 / width runs
    of `unit` codes, the first run in the lowest bits of its bytes. out [rows, B, elements] uint8,
    contiguous, takes the bits in the low end of each byte, and is returned.
    """
    runs = 8 // width
    units = out.shape[2] // (unit * runs)
    stored = field(raw, offset, units * unit)
    places = out.view(f"V{unit}").reshape(*out.shape[:2], units, runs)
    if units == 1:
        places[..., 0, :] = stored[..., None]
    else:
        for i in range(units):
            places[..., i, :] = field(raw, offset + i * unit, unit)[..., None]
    # Bits of the neighbouring byte that the shift brings in are masked away.
    words = out.view("<u8").reshape(out.shape[0], -1)
    np.right_shift(words, _shifts(unit, width, words.shape[1]), out=words)
    np.bitwise_and(words, _every_byte((1 << width) - 1), out=words)
    return out


def add_bits(bits: np.ndarray, shift: int, codes: np.ndarray) -> None:
    """codes |= bits << shift, for contiguous uint8 arrays of one shape; `bits` is overwritten."""
    words = bits.reshape(-1).view("<u8")
    np.left_shift(words, np.uint64(shift), out=words)  # bits are few: none leaves its byte
    flat = codes.reshape(-1).view("<u8")
    np.bitwise_or(flat, words, out=flat)


def _every_byte(value: int) -> np.uint64:
    return np.uint64(value * 0x0101010101010101)
