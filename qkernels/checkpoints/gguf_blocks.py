"""The block types of GGUF tensors, as data: how large a block is, what it means, and how it is
decoded.

A quantized row of K elements is K / `elements` blocks of `nbytes` bytes, one after the other. A
type becomes readable by giving its entry a `spec` and a `decode` function; every type is listed, so
that others are refused by name. Block layouts: ggml/src/ggml-common.h of llama.cpp. What is decoded
has, bit for bit, the values that the `gguf` package gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..quant.spec import E2M1, IQ4_NL, QuantSpec
from .gguf_fields import Plain, add_bits, copied, field, spread, take_half
from .gguf_kquants import (
    decode_iq4_xs,
    decode_q2_k,
    decode_q3_k,
    decode_q4_k,
    decode_q5_k,
    decode_q6_k,
)


class Refusal(NamedTuple):
    """A block that cannot be read."""

    row: int
    block: int
    reason: str  # "expected ..., got ..."


@dataclass(frozen=True)
class BlockType:
    """One ggml type: `elements` values are stored in `nbytes` bytes."""

    id: int
    name: str
    elements: int
    nbytes: int
    dtype: torch.dtype | None = None  # of dense types that can be read
    spec: QuantSpec | None = None  # of quantized types that can be read
    decode: Callable[[np.ndarray, Plain], None] | None = None  # of raw [rows, B, nbytes]
    halves: tuple[
        int, ...
    ] = ()  # byte offsets of the block's float16 numbers, which must be finite
    refuse: Callable[[np.ndarray], Refusal | None] | None = None  # for other reasons

    def empty(self, rows: int, blocks: int, codes: np.ndarray) -> Plain:
        """Arrays for `decode` to fill; codes: uint8 [rows * blocks * elements], the caller's."""
        spec = self.spec
        assert spec is not None
        groups = (rows, blocks, self.elements // spec.group_size)
        kind = np.dtype(
            str(spec.scale_dtype).removeprefix("torch.") if spec.scale != "e8m0" else "u1"
        )
        minimum = spec.two_level and spec.zero == "minimum"
        return Plain(
            codes.reshape(rows, blocks, self.elements),
            np.empty(groups, kind),
            np.empty(groups, kind) if spec.zero_dtype is not None else None,
            np.empty(groups[:2], np.float16) if spec.two_level else None,
            np.empty(groups[:2], np.float16) if minimum else None,
        )


def _nibbles(raw: np.ndarray, offset: int, codes: np.ndarray) -> None:
    """16 bytes at `offset` of each block: the low nibbles are elements 0..15, the high ones
    16..31."""
    spread(raw, offset, 16, 4, codes)


def _fifth_bits(raw: np.ndarray, offset: int, codes: np.ndarray) -> None:
    """32 bits at `offset` of each block: the highest bit of each code, in order."""
    bits = np.unpackbits(copied(raw, offset, "u1", 4), bitorder="little")
    add_bits(bits, 4, codes)


def _take_minimum(raw: np.ndarray, offset: int, out: np.ndarray | None) -> None:
    """w = d * q + m, which is d * q - (-m) bit for bit."""
    assert out is not None
    take_half(raw, offset, out)
    patterns = out.view(np.uint16)
    np.bitwise_xor(patterns, np.uint16(0x8000), out=patterns)  # the sign bit


def _decode_q4_0(raw: np.ndarray, out: Plain) -> None:
    """d float16, 16 bytes of nibbles; w = d * (q - 8)."""
    take_half(raw, 0, out.scale)
    _nibbles(raw, 2, out.codes)


def _decode_q4_1(raw: np.ndarray, out: Plain) -> None:
    """d, m float16, 16 bytes of nibbles; w = d * q + m."""
    take_half(raw, 0, out.scale)
    _take_minimum(raw, 2, out.zero)
    _nibbles(raw, 4, out.codes)


def _decode_q5_0(raw: np.ndarray, out: Plain) -> None:
    """d float16, 32 high bits, 16 bytes of nibbles; w = d * (q - 16)."""
    take_half(raw, 0, out.scale)
    _nibbles(raw, 6, out.codes)
    _fifth_bits(raw, 2, out.codes)


def _decode_q5_1(raw: np.ndarray, out: Plain) -> None:
    """d, m float16, 32 high bits, 16 bytes of nibbles; w = d * q + m."""
    take_half(raw, 0, out.scale)
    _take_minimum(raw, 2, out.zero)
    _nibbles(raw, 8, out.codes)
    _fifth_bits(raw, 4, out.codes)


def _decode_q8_0(raw: np.ndarray, out: Plain) -> None:
    """d float16, 32 int8; w = d * q, and code = q + 128, which flips the top bit."""
    take_half(raw, 0, out.scale)
    out.codes.view("V32")[..., 0] = field(raw, 2, 32)
    flat = out.codes.reshape(-1)
    np.bitwise_xor(flat, np.uint8(0x80), out=flat)


# MXFP4 stores 2^(e - 127), and ggml's table of values is doubled, so a code's value counts
# 2^(e - 128). That is the e8m0 number e - 1, except at 0: 2^-128 is below all of them, but
# 2^-127 times half of a value is the same, for those values whose half is in the table too.
_E2M1_HALF = {
    value: E2M1.index(value // 2)
    for value in E2M1
    if value // 2 * 2 == value and value // 2 in E2M1
}
_HALF_CODE = np.array([_E2M1_HALF.get(value, 255) for value in E2M1], np.uint8)
_MAGNITUDE = np.abs(np.array(E2M1, np.int16)).astype(np.uint16)


def _decode_mxfp4(raw: np.ndarray, out: Plain) -> None:
    """An exponent e, 16 bytes of nibbles; w = 2^(e - 128) * table[q]."""
    _nibbles(raw, 1, out.codes)
    exponent = copied(raw, 0, "u1")
    tiny = exponent == 0
    if tiny.any():
        out.codes[tiny] = _HALF_CODE[out.codes[tiny]]
        exponent[tiny] = 1
    np.subtract(exponent, np.uint8(1), out=out.scale[..., 0])


def _refuse_mxfp4(raw: np.ndarray) -> Refusal | None:
    """Blocks with values beyond float32, or with e = 0 and a code without a half."""
    rows, blocks = np.nonzero((raw[..., 0] == 0) | (raw[..., 0] > 252))
    if not len(rows):
        return None
    exponent, stored = raw[rows, blocks, 0], raw[rows, blocks, 1:]
    codes = np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=1)
    halved = (_HALF_CODE[codes] != 255).all(axis=1)
    # 2^(e - 128) * value is finite if it is below 2^128.
    limit = np.uint16(1) << (256 - exponent.astype(np.uint16)).clip(max=15)
    finite = _MAGNITUDE[codes].max(axis=1) < limit
    bad = ~np.where(exponent == 0, halved, finite)
    if not bad.any():
        return None
    first = int(bad.argmax())
    e = int(exponent[first])
    reason = f"expected values within float32, got an exponent of {e}"
    if e == 0:
        reason = "expected an exponent of at least 1, got 0 with values of 0.5 or 1.5"
    return Refusal(int(rows[first]), int(blocks[first]), reason)


TYPES: dict[int, BlockType] = {
    entry.id: entry
    for entry in (
        BlockType(0, "F32", 1, 4, dtype=torch.float32),
        BlockType(1, "F16", 1, 2, dtype=torch.float16),
        BlockType(2, "Q4_0", 32, 18, None, QuantSpec(4, 32), _decode_q4_0, (0,)),
        BlockType(3, "Q4_1", 32, 20, None, QuantSpec(4, 32, zero="minimum"), _decode_q4_1, (0, 2)),
        BlockType(6, "Q5_0", 32, 22, None, QuantSpec(5, 32), _decode_q5_0, (0,)),
        BlockType(7, "Q5_1", 32, 24, None, QuantSpec(5, 32, zero="minimum"), _decode_q5_1, (0, 2)),
        BlockType(8, "Q8_0", 32, 34, None, QuantSpec(8, 32), _decode_q8_0, (0,)),
        BlockType(9, "Q8_1", 32, 40),
        BlockType(
            10, "Q2_K", 256, 84, None, QuantSpec(2, 16, "uint4", "minimum"), decode_q2_k, (80, 82)
        ),
        BlockType(11, "Q3_K", 256, 110, None, QuantSpec(3, 16, "int8"), decode_q3_k, (108,)),
        BlockType(
            12, "Q4_K", 256, 144, None, QuantSpec(4, 32, "int8", "minimum"), decode_q4_k, (0, 2)
        ),
        BlockType(
            13, "Q5_K", 256, 176, None, QuantSpec(5, 32, "int8", "minimum"), decode_q5_k, (0, 2)
        ),
        BlockType(14, "Q6_K", 256, 210, None, QuantSpec(6, 16, "int8"), decode_q6_k, (208,)),
        BlockType(15, "Q8_K", 256, 292),
        BlockType(16, "IQ2_XXS", 256, 66),
        BlockType(17, "IQ2_XS", 256, 74),
        BlockType(18, "IQ3_XXS", 256, 98),
        BlockType(19, "IQ1_S", 256, 50),
        BlockType(20, "IQ4_NL", 32, 18, None, QuantSpec(4, 32, table=IQ4_NL), _decode_q4_0, (0,)),
        BlockType(21, "IQ3_S", 256, 110),
        BlockType(22, "IQ2_S", 256, 82),
        BlockType(
            23,
            "IQ4_XS",
            256,
            136,
            None,
            QuantSpec(4, 32, "int8", table=IQ4_NL),
            decode_iq4_xs,
            (0,),
        ),
        BlockType(24, "I8", 1, 1),
        BlockType(25, "I16", 1, 2),
        BlockType(26, "I32", 1, 4),
        BlockType(27, "I64", 1, 8),
        BlockType(28, "F64", 1, 8),
        BlockType(29, "IQ1_M", 256, 56),
        BlockType(30, "BF16", 1, 2, dtype=torch.bfloat16),
        BlockType(34, "TQ1_0", 256, 54),
        BlockType(35, "TQ2_0", 256, 66),
        BlockType(
            39,
            "MXFP4",
            32,
            17,
            spec=QuantSpec(4, 32, "e8m0", table=E2M1),
            decode=_decode_mxfp4,
            refuse=_refuse_mxfp4,
        ),
        BlockType(40, "NVFP4", 64, 36),
        BlockType(41, "Q1_0", 128, 18),
    )
}

BY_NAME: dict[str, BlockType] = {entry.name: entry for entry in TYPES.values()}
QUANTIZED = tuple(entry.name for entry in TYPES.values() if entry.decode is not None)
DENSE = tuple(entry.name for entry in TYPES.values() if entry.dtype is not None)


def refused(block: BlockType, raw: np.ndarray) -> Refusal | None:
    """The first block of raw [rows, B, nbytes] that cannot be read; None if all can."""
    exponent = np.uint16(0x7C00)  # all ones: infinity or NaN
    for offset in block.halves:
        bits = copied(raw, offset, "<u2")
        np.bitwise_and(bits, exponent, out=bits)
        bad = bits == exponent
        if bad.any():
            row, at = np.unravel_index(int(bad.argmax()), bad.shape)
            return Refusal(int(row), int(at), "expected finite scales, got infinity or NaN")
    return None if block.refuse is None else block.refuse(raw)
