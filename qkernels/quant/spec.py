"""What the bits of a quantized weight mean."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

BITS = (2, 3, 4, 5, 6, 8)
BLOCK = 256  # columns that share one float16 when scales have two levels
UNIT_COLS = 16  # no group straddles a unit of the packed layout

FLAT_SCALES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
TWO_LEVEL_SCALES: dict[str, torch.dtype] = {"int8": torch.int8, "uint4": torch.uint8}
ZEROS = ("symmetric", "integer", "minimum")

# E2M1, doubled so that it is integral: a reader halves the scale (MXFP4: exponent - 1).
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# The non-uniform levels of llama.cpp's IQ4_NL and IQ4_XS.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TABLE_NAMES: dict[tuple[int, ...], str] = {E2M1: "e2m1", IQ4_NL: "iq4nl"}


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class QuantSpec:
    """A format of quantized weights, by four small choices.

    `w = scale * (code - zero)`, `w = scale * code - minimum` or `w = scale * table[code]`, in
    float32, in that order.

    bits: of a code: 2, 3, 4, 5, 6 or 8.
    group_size: columns per scale, a multiple of 16; -1: the whole row. The last group of a row may
    be shorter.
    scale: how a group's scale is stored. Flat: float32, float16, bfloat16, e8m0 (a power of two),
    e4m3. Two-level:
        int8, times the float16 of its block of 256 columns; or uint4, where scale and minimum share
        a byte.
    zero: symmetric: 2^(bits-1), or 0 with a table; integer: a uint8 zero point per group; minimum:
    of the scale's kind.
    table: 16 int8 values that 4-bit codes index.
    act_order: columns belong to groups through a g_idx of the weight, not by position.

    NVFP4 has a float32 of the whole tensor beside its e4m3 scales. It is no part of the weight
    here: whoever holds the
    weight multiplies the output by it (and by 1/2, as E2M1 is doubled), which keeps 4.5 bits and
    one layout.

    Raises ValueError for a combination that does not exist.
    """

    bits: int
    group_size: int = 32
    scale: str = "float16"
    zero: str = "symmetric"
    table: tuple[int, ...] | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, text: str) -> None:
            if not ok:
                raise ValueError(f"QuantSpec: {text}")

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        need(
            is_int(self.bits) and self.bits in BITS,
            f"bits must be one of {BITS}, got {self.bits!r}",
        )
        need(
            is_int(self.group_size)
            and (
                self.group_size == -1 or (self.group_size > 0 and self.group_size % UNIT_COLS == 0)
            ),
            f"group_size must be a positive multiple of {UNIT_COLS}, or -1 for the whole row, "
            f"got {self.group_size!r}",
        )
        scales = (*FLAT_SCALES, *TWO_LEVEL_SCALES)
        need(self.scale in scales, f"scale must be one of {scales}, got {self.scale!r}")
        need(self.zero in ZEROS, f"zero must be one of {ZEROS}, got {self.zero!r}")
        if self.two_level:
            need(
                self.group_size > 0 and BLOCK % self.group_size == 0,
                f"two-level scales ({self.scale}) need a group_size that divides {BLOCK}, got "
                f"{self.group_size}",
            )
            need(
                self.zero != "integer",
                f"two-level scales ({self.scale}) take symmetric or minimum, not integer zeros",
            )
        need(
            self.scale != "uint4" or self.zero == "minimum",
            "scale uint4 holds a minimum too: it needs zero='minimum'",
        )
        need(
            self.scale not in ("e8m0", "e4m3") or self.zero != "minimum",
            f"a minimum is stored like the scale, and {self.scale} is too coarse for it: use "
            "symmetric or integer",
        )
        if self.table is not None:
            need(self.bits == 4, f"a table of 16 values needs bits=4, got {self.bits}")
            need(
                self.zero == "symmetric",
                f"a table has its own zero: zero must be symmetric, got {self.zero}",
            )
            object.__setattr__(self, "table", tuple(self.table))
            need(
                len(self.table) == 16 and all(is_int(v) and -128 <= v <= 127 for v in self.table),
                f"a table is 16 integers from -128 to 127, got {self.table!r}",
            )
            need(any(self.table), "a table of zeros means nothing")
        need(isinstance(self.act_order, bool), f"act_order must be a bool, got {self.act_order!r}")
        need(
            not (self.act_order and self.group_size == -1),
            "act_order needs groups: group_size=-1 has only one",
        )

    @property
    def two_level(self) -> bool:
        return self.scale in TWO_LEVEL_SCALES

    @property
    def scale_dtype(self) -> torch.dtype:
        return TWO_LEVEL_SCALES[self.scale] if self.two_level else FLAT_SCALES[self.scale]

    @property
    def zero_dtype(self) -> torch.dtype | None:
        """dtype of the tensor of zeros; None where there is none (symmetric, or minima inside uint4
        pairs)."""
        if self.zero == "symmetric" or self.scale == "uint4":
            return None
        return torch.uint8 if self.zero == "integer" else self.scale_dtype

    @property
    def zero_point(self) -> int:
        """What a symmetric code has subtracted."""
        return 0 if self.table is not None else 1 << (self.bits - 1)

    def group(self, k: int) -> int:
        """Columns per scale in a weight of k columns: a multiple of 16 even for the whole row."""
        return round_up(k, UNIT_COLS) if self.group_size == -1 else self.group_size

    def groups(self, k: int) -> int:
        """Groups of a row of k columns, before padding."""
        return -(-k // self.group(k))

    def padded_k(self, k: int) -> int:
        return round_up(k, BLOCK if self.two_level else self.group(k))

    @property
    def bits_per_weight(self) -> float:
        """Bits of code, scale and zero per weight, for rows of whole groups (one group per row
        counts as free)."""
        if self.group_size == -1:
            return float(self.bits)
        per_group = self.scale_dtype.itemsize + (self.zero_dtype.itemsize if self.zero_dtype else 0)
        blocks = (2 if self.zero == "minimum" else 1) * 16 / BLOCK if self.two_level else 0.0
        return self.bits + 8 * per_group / self.group_size + blocks

    def __str__(self) -> str:
        parts = [
            f"W{self.bits}",
            "row" if self.group_size == -1 else f"g{self.group_size}",
            self.scale,
        ]
        if self.zero != "symmetric":
            parts.append({"integer": "zero", "minimum": "min"}[self.zero])
        if self.table is not None:
            parts.append(_TABLE_NAMES.get(self.table, "table"))
        if self.act_order:
            parts.append("act-order")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `from_dict` is the inverse."""
        fields = asdict(self)
        fields["table"] = None if self.table is None else list(self.table)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Raises ValueError for unknown fields, which a newer version may have written."""
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown or "bits" not in fields:
            raise ValueError(
                f"QuantSpec: unknown fields {unknown}" if unknown else "QuantSpec: bits is missing"
            )
        table = fields.get("table")
        return cls(**{**fields, "table": None if table is None else tuple(table)})

    @classmethod
    def from_scheme(cls, scheme: str, group_size: int | None = None, **choices: Any) -> QuantSpec:
        """The weights of a scheme: "W4A16", "W8A8", "w6a16", "MXFP4", "NVFP4"; `scheme_act` tells
        of the activations.

        group_size: None is 32; -1 at 8 bits is what others call W8A8. choices: further fields of
        QuantSpec.
        Raises ValueError for an unknown scheme.
        """
        if not isinstance(scheme, str):
            raise TypeError(f"QuantSpec: a scheme is a text like 'W4A16', got {scheme!r}")
        named = {
            "MXFP4": cls(4, 32, "e8m0", table=E2M1),
            "NVFP4": cls(4, 16, "e4m3", table=E2M1),
        }.get(scheme.upper())
        if named is not None:
            group = named.group_size if group_size is None else group_size
            return replace(named, group_size=group, **choices)
        bits, _ = _parse_scheme(scheme)
        return cls(bits, 32 if group_size is None else group_size, **choices)


def scheme_act(scheme: str) -> str:
    """The activations of a scheme: "int8" for W?A8, "float" for W?A16 and the float formats. Raises
    ValueError."""
    return (
        "int8"
        if scheme.upper() not in ("MXFP4", "NVFP4") and _parse_scheme(scheme)[1] == 8
        else "float"
    )


def _parse_scheme(scheme: str) -> tuple[int, int]:
    match = re.fullmatch(r"[Ww](\d)[Aa](8|16)", scheme)
    if not match or int(match[1]) not in BITS:
        known = ", ".join(f"W{bits}A{act}" for act in (16, 8) for bits in BITS)
        raise ValueError(f"unknown scheme {scheme!r}; known are {known}, MXFP4 and NVFP4")
    return int(match[1]), int(match[2])
