"""The block types of GGUF tensors, as data: how large a block is, what it means, and how it is
decoded.

A quantized row of K elements is K / `elements` blocks of `nbytes` bytes, one after the other. A
type becomes readable by giving its entry a `spec` and a `decode` function; every type is listed, so
that others are refused by name. Block layouts: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..quant.spec import QuantSpec

# raw [rows, G, nbytes] uint8, possibly read-only and never modified; codes [rows, G, elements]
# uint8, contiguous, filled here; returns scale [rows, G] and zero [rows, G] or None, new contiguous
# arrays in the dtypes of the spec.
Decode = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, "np.ndarray | None"]]


@dataclass(frozen=True)
class BlockType:
    """One ggml type: `elements` values are stored in `nbytes` bytes."""

    id: int
    name: str
    elements: int
    nbytes: int
    dtype: torch.dtype | None = None  # of dense types that can be read
    spec: QuantSpec | None = None  # of quantized types that can be read
    decode: Decode | None = None
    halves: tuple[
        int, ...
    ] = ()  # byte offsets of the block's float16 numbers, which must be finite


def _field(raw: np.ndarray, offset: int, size: int) -> np.ndarray:
    """[rows, G] view of `size` opaque bytes per block. Copying whole fields, instead of slicing
    bytes, saves numpy an inner loop of 16 elements per block."""
    block = np.dtype(
        {"names": ["f"], "formats": [f"V{size}"], "offsets": [offset], "itemsize": raw.shape[-1]}
    )
    return raw.view(block)["f"][..., 0]


def _half(raw: np.ndarray, offset: int) -> np.ndarray:
    """[rows, G] uint16, the bit patterns of a float16 field, copied."""
    out = np.empty(raw.shape[:2], np.dtype("V2"))
    out[...] = _field(raw, offset, 2)
    return out.view("<u2")


def _nibbles(raw: np.ndarray, offset: int, codes: np.ndarray) -> None:
    """16 bytes at `offset` of each block: the low nibbles are elements 0..15, the high ones
    16..31."""
    stored = _field(raw, offset, 16)
    halves = codes.view("V16")
    halves[..., 0] = stored
    halves[..., 1] = stored
    words = codes.view("<u8")
    for j in (2, 3):  # elements 16..31
        np.right_shift(words[..., j], np.uint64(4), out=words[..., j])
    flat = words.reshape(-1)  # also drops what the shift carried in from the neighbouring byte
    np.bitwise_and(flat, np.uint64(0x0F0F0F0F0F0F0F0F), out=flat)


def _decode_q4_0(raw: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, None]:
    """d float16, 16 bytes of nibbles; w = d * (q - 8)."""
    _nibbles(raw, 2, codes)
    return _half(raw, 0).view("<f2"), None


def _decode_q4_1(raw: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d, m float16, 16 bytes of nibbles; w = d * q + m, which is d * q - (-m) bit for bit."""
    _nibbles(raw, 4, codes)
    minimum = _half(raw, 2)
    np.bitwise_xor(minimum, np.uint16(0x8000), out=minimum)  # the sign bit
    return _half(raw, 0).view("<f2"), minimum.view("<f2")


def _decode_q8_0(raw: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, None]:
    """d float16, 32 int8; w = d * q, and code = q + 128, which flips the top bit."""
    codes.view("V32")[..., 0] = _field(raw, 2, 32)
    flat = codes.reshape(-1)
    np.bitwise_xor(flat, np.uint8(0x80), out=flat)
    return _half(raw, 0).view("<f2"), None


TYPES: dict[int, BlockType] = {
    entry.id: entry
    for entry in (
        BlockType(0, "F32", 1, 4, dtype=torch.float32),
        BlockType(1, "F16", 1, 2, dtype=torch.float16),
        BlockType(2, "Q4_0", 32, 18, spec=QuantSpec(4, 32), decode=_decode_q4_0, halves=(0,)),
        BlockType(
            3,
            "Q4_1",
            32,
            20,
            spec=QuantSpec(4, 32, zero="minimum"),
            decode=_decode_q4_1,
            halves=(0, 2),
        ),
        BlockType(6, "Q5_0", 32, 22),
        BlockType(7, "Q5_1", 32, 24),
        BlockType(8, "Q8_0", 32, 34, spec=QuantSpec(8, 32), decode=_decode_q8_0, halves=(0,)),
        BlockType(9, "Q8_1", 32, 40),
        BlockType(10, "Q2_K", 256, 84),
        BlockType(11, "Q3_K", 256, 110),
        BlockType(12, "Q4_K", 256, 144),
        BlockType(13, "Q5_K", 256, 176),
        BlockType(14, "Q6_K", 256, 210),
        BlockType(15, "Q8_K", 256, 292),
        BlockType(16, "IQ2_XXS", 256, 66),
        BlockType(17, "IQ2_XS", 256, 74),
        BlockType(18, "IQ3_XXS", 256, 98),
        BlockType(19, "IQ1_S", 256, 50),
        BlockType(20, "IQ4_NL", 32, 18),
        BlockType(21, "IQ3_S", 256, 110),
        BlockType(22, "IQ2_S", 256, 82),
        BlockType(23, "IQ4_XS", 256, 136),
        BlockType(24, "I8", 1, 1),
        BlockType(25, "I16", 1, 2),
        BlockType(26, "I32", 1, 4),
        BlockType(27, "I64", 1, 8),
        BlockType(28, "F64", 1, 8),
        BlockType(29, "IQ1_M", 256, 56),
        BlockType(30, "BF16", 1, 2, dtype=torch.bfloat16),
        BlockType(34, "TQ1_0", 256, 54),
        BlockType(35, "TQ2_0", 256, 66),
        BlockType(39, "MXFP4", 32, 17),
        BlockType(40, "NVFP4", 64, 36),
        BlockType(41, "Q1_0", 128, 18),
    )
}

BY_NAME: dict[str, BlockType] = {entry.name: entry for entry in TYPES.values()}
QUANTIZED = tuple(entry.name for entry in TYPES.values() if entry.decode is not None)
DENSE = tuple(entry.name for entry in TYPES.values() if entry.dtype is not None)


def nonfinite_group(block: BlockType, raw: np.ndarray) -> tuple[int, int] | None:
    """(row, group) of the first infinite or NaN float16 number in raw [rows, G, nbytes]; None if
    all are finite."""
    exponent = np.uint16(0x7C00)  # all ones: infinity or NaN
    for offset in block.halves:
        bits = _half(raw, offset)
        np.bitwise_and(bits, exponent, out=bits)
        bad = bits == exponent
        if bad.any():
            row, group = np.unravel_index(int(bad.argmax()), bad.shape)
            return int(row), int(group)
    return None
