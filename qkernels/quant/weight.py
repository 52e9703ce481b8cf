"""Weights before packing (`PlainWeight`, the hub between checkpoints and kernels) and after it
(`PackedWeight`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout
from .spec import BLOCK, QuantSpec

UNIT_ROWS, UNIT_COLS = layout.UNIT_ROWS, layout.UNIT_COLS
# Codes packed at a time: their packed form stays in the cache until it is copied to its place.
_PACK_CODES = 1 << 20


class WeightKind(NamedTuple):
    """What decides which kernel can run a weight: constants only, so that it can be part of a cache
    key."""

    bits: int
    group_size: int  # of the spec: -1 is the whole row
    scale: str
    zero: str
    table: bool

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        zero = {"symmetric": "", "integer": " zero", "minimum": " min"}[self.zero]
        return f"W{self.bits} {group} {self.scale}{zero}{' table' if self.table else ''}"


def dequantize_groups(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    block_scale: Tensor | None,
    block_zero: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    group: int,
    g_idx: Tensor | None = None,
) -> Tensor:
    """The definition of every format, in float32 and in this order of operations.

    codes [N, K] uint8; scale, zero [N, G]; block_scale, block_zero [N, ceil(G * group / 256)]
    float16; table [16] int8;
    group: columns per scale; g_idx [K]: the group of each column, if not by position -> [N, K]
    float32.
    """
    device, groups = codes.device, scale.shape[1]
    nibbles = scale.dtype == torch.uint8  # scale low, minimum high
    s = (scale & 15).float() if nibbles else scale.float()
    integer = zero is not None and zero.dtype == torch.uint8
    minimum = (scale >> 4).float() if nibbles else None if integer or zero is None else zero.float()
    if block_scale is not None:
        block_of = torch.arange(groups, device=device) * group // BLOCK
        s = s * block_scale.float()[:, block_of]
        if minimum is not None and block_zero is not None:
            minimum = minimum * block_zero.float()[:, block_of]
    of = torch.arange(codes.shape[1], device=device) // group if g_idx is None else g_idx.long()
    if table is not None:
        q = table.float()[codes.long()]
    elif minimum is not None:
        return s[:, of] * codes.float() - minimum[:, of]
    elif zero is not None:
        q = codes.float() - zero.float()[:, of]
    else:
        q = codes.float() - float(1 << (bits - 1))
    return s[:, of] * q


@dataclass(eq=False)
class PlainWeight:
    """A quantized weight [N, K], row-major, one code per byte, or a block of its rows.

    codes [N, K] uint8; scale [N, G] of the spec's dtype, G = ceil(K / group); zero [N, G] uint8 or
    the scale's dtype;
    block_scale, block_zero [N, ceil(K / 256)] float16; g_idx [K] int32. See `QuantSpec` for their
    meaning.

    Raises ValueError where shapes or dtypes do not fit the spec; `validate` looks at the values
    too.
    """

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    block_scale: Tensor | None = None
    block_zero: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        if self.codes.dim() != 2 or min(self.codes.shape) < 1:
            raise ValueError(
                f"PlainWeight: codes must be [N, K] with N, K > 0, got {list(self.codes.shape)}"
            )
        n, k = self.codes.shape
        groups, blocks = spec.groups(k), -(-k // BLOCK)
        minimum = spec.two_level and spec.zero == "minimum"
        wanted = {
            "codes": (torch.uint8, (n, k)),
            "scale": (spec.scale_dtype, (n, groups)),
            "zero": (spec.zero_dtype, (n, groups)) if spec.zero_dtype else None,
            "block_scale": (torch.float16, (n, blocks)) if spec.two_level else None,
            "block_zero": (torch.float16, (n, blocks)) if minimum else None,
            "g_idx": (torch.int32, (k,)) if spec.act_order else None,
        }
        for name, want in wanted.items():
            tensor = getattr(self, name)
            if want is None or tensor is None:
                if (want is None) != (tensor is None):
                    state = "has no" if want is None else "needs a"
                    raise ValueError(f"PlainWeight: {spec} {state} {name}")
                continue
            if (tensor.dtype, tuple(tensor.shape)) != want:
                raise ValueError(
                    f"PlainWeight: {name} of {spec} must be {want[0]} {list(want[1])}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(
            t.nbytes for t in (getattr(self, f.name) for f in fields(self)) if isinstance(t, Tensor)
        )

    def validate(self, first_row: int = 0) -> None:
        """Raises ValueError for codes beyond the bits, scales or minima that are not finite, g_idx
        out of range.

        first_row: added to the row named in the message, for blocks of a larger weight.
        """
        self._check_codes(first_row)
        self._check_groups(first_row)

    def _check_codes(self, first_row: int) -> None:
        top = (1 << self.spec.bits) - 1
        if self.spec.bits < 8 and int(self.codes.max()) > top:
            row, col = (self.codes > top).nonzero()[0].tolist()
            raise ValueError(
                f"code {int(self.codes[row, col])} at row {row + first_row}, column {col} "
                f"is beyond {self.spec.bits} bits (0 to {top})"
            )

    def _check_groups(self, first_row: int) -> None:
        for name in ("scale", "zero", "block_scale", "block_zero"):
            tensor = getattr(self, name)
            if tensor is None or tensor.dtype in (torch.int8, torch.uint8):
                continue
            values = tensor if tensor.dtype.itemsize > 1 else tensor.float()
            if not _finite(values):
                row, group = (~torch.isfinite(values)).nonzero()[0].tolist()
                what = "block" if name.startswith("block") else "group"
                raise ValueError(
                    f"{name} of row {row + first_row}, {what} {group} is "
                    f"{values[row, group]}, not finite"
                )
        if self.g_idx is not None:
            check_g_idx(self.g_idx, self.spec.group(self.k))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: computed in float32, then rounded to dtype."""
        table = (
            None
            if self.spec.table is None
            else torch.tensor(self.spec.table, dtype=torch.int8, device=self.codes.device)
        )
        return dequantize_groups(
            self.codes, self.scale, self.zero, self.block_scale, self.block_zero, table,
            bits=self.spec.bits, group=self.spec.group(self.k), g_idx=self.g_idx,
        ).to(dtype)  # fmt: skip

    def rows(self, start: int, stop: int) -> PlainWeight:
        """Rows start..stop, as views."""
        cut: dict[str, Any] = {}
        for name in ("codes", "scale", "zero", "block_scale", "block_zero"):
            tensor = getattr(self, name)
            cut[name] = None if tensor is None else tensor[start:stop]
        return replace(self, **cut)

    def pack(self) -> PackedWeight:
        """The packed weight, on the same device. Raises ValueError as `validate` does."""
        packed = PackedWeight.empty(self.spec, self.n, self.k, device=self.codes.device)
        packed.write_rows(0, self)
        return packed


def _finite(values: Tensor) -> bool:
    # The extremes tell at a fifth of the cost: NaN is both, and infinity one of them.
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError, its message beginning with `where`, for floats of a packed weight that are
    not finite. On meta there are none to look at."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor.float()):
            raise ValueError(f"{where}{name} has values that are not finite")


def check_g_idx(g_idx: Tensor, group: int) -> None:
    """Every group must have `group` columns (the last one the rest). Raises ValueError."""
    k = g_idx.shape[0]
    groups = -(-k // group)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx must be from 0 to {groups - 1}, got {low if low < 0 else high}")
    counts = torch.bincount(g_idx.long(), minlength=groups).tolist()
    for index, count in enumerate(counts):
        want = min(group, k - index * group)
        if count != want:
            raise ValueError(
                f"g_idx puts {count} columns into group {index}, which has room for exactly {want}"
            )


@dataclass(eq=False)
class PackedWeight:
    """A quantized weight in the packed layout (docs/design.md): what every kernel reads, on every
    device.

    codes [Np, Kp * bits / 8] int8; scale, zero [Np/64, Kp/G, 64]; block_scale, block_zero [Np/64,
    Kp/256, 64] float16;
    table [16] int8; perm [K] int64: with act_order, packed column i is logical column perm[i].
    """

    spec: QuantSpec
    n: int
    k: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    block_scale: Tensor | None = None
    block_zero: Tensor | None = None
    table: Tensor | None = None
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        self.group = spec.group(self.k)
        self.kind = WeightKind(
            spec.bits, spec.group_size, spec.scale, spec.zero, spec.table is not None
        )

    @classmethod
    def empty(
        cls, spec: QuantSpec, n: int, k: int, device: torch.device | str = "cpu"
    ) -> PackedWeight:
        """Room for an [n, k] weight; `write_rows` fills it. Raises ValueError unless n, k > 0."""
        if n < 1 or k < 1:
            raise ValueError(f"PackedWeight: a weight needs n > 0 and k > 0, got n = {n}, k = {k}")
        np, kp = layout.padded_n(n), spec.padded_k(k)
        groups = (np // UNIT_ROWS, kp // spec.group(k), UNIT_ROWS)
        blocks = (np // UNIT_ROWS, kp // BLOCK, UNIT_ROWS)
        minimum = spec.two_level and spec.zero == "minimum"
        return cls(
            spec, n, k,
            torch.empty(np, kp * spec.bits // 8, dtype=torch.int8, device=device),
            torch.empty(groups, dtype=spec.scale_dtype, device=device),
            torch.empty(groups, dtype=spec.zero_dtype, device=device) if spec.zero_dtype else None,
            torch.empty(blocks, dtype=torch.float16, device=device) if spec.two_level else None,
            torch.empty(blocks, dtype=torch.float16, device=device) if minimum else None,
            torch.tensor(spec.table, dtype=torch.int8, device=device) if spec.table else None,
            torch.full((k,), -1, dtype=torch.int64, device=device) if spec.act_order else None,
        )  # fmt: skip

    def write_rows(self, start: int, plain: PlainWeight) -> None:
        """Packs rows start.. from `plain`, whose values are checked first.

        start: a multiple of 64; only the block that ends the weight may have a number of rows that
        is not.
        Raises ValueError for a spec, shape or row range that does not fit, and as
        `PlainWeight.validate` does.
        """
        stop = start + plain.n
        if plain.spec != self.spec or plain.k != self.k:
            raise ValueError(
                f"write_rows: {self.spec} of {self.k} columns cannot take {plain.spec} of {plain.k}"
            )
        if start < 0 or start % UNIT_ROWS or stop > self.n or (stop != self.n and stop % UNIT_ROWS):
            raise ValueError(
                f"write_rows: rows {start} to {stop} of {self.n} do not fall on whole blocks "
                f"of {UNIT_ROWS}"
            )
        plain._check_groups(start)
        codes = plain.codes
        if self.perm is not None and plain.g_idx is not None:
            perm = torch.argsort(plain.g_idx.to(self.perm.device), stable=True)
            if int(self.perm[0]) < 0:
                self.perm.copy_(perm)
            elif not torch.equal(self.perm, perm):
                raise ValueError(
                    f"write_rows: g_idx of rows {start} to {stop} differs from that of the "
                    "rows before"
                )
            codes = codes[:, perm.to(codes.device)]
        step = max(UNIT_ROWS, _PACK_CODES // self.k // UNIT_ROWS * UNIT_ROWS)
        for row in range(0, plain.n, step):
            part = codes[row : row + step].contiguous()
            try:  # packing looks at every code anyway, and refuses those beyond the bits
                packed = pack_codes(part, self.spec.bits, self.group, self.spec.two_level)
            except RuntimeError:
                plain._check_codes(start)  # names the row and the column
                raise
            rows = slice(start + row, start + row + packed.shape[0])
            self.codes[rows] = packed
            blocks = slice(rows.start // UNIT_ROWS, rows.stop // UNIT_ROWS)
            for name in ("scale", "zero", "block_scale", "block_zero"):
                values, room = getattr(plain, name), getattr(self, name)
                if values is None:
                    continue
                groups = layout.pack_groups(values[row : row + step], room.shape[1])
                raw = torch.uint8 if values.dtype.itemsize == 1 else values.dtype
                room[blocks].view(raw).copy_(groups.view(raw))  # torch copies no float8

    def op_args(self) -> tuple[Any, ...]:
        """The arguments that every schema lists for a weight, in order (`W` in docs/design.md)."""
        return (
            self.codes, self.scale, self.zero, self.block_scale, self.block_zero, self.table,
            self.spec.bits, self.group, self.n, self.k,
        )  # fmt: skip

    def unpack(self) -> PlainWeight:
        """The plain weight, bit for bit what was packed."""
        codes = layout.unpack(self.codes, self.spec.bits, self.n, self.k)
        groups, blocks = self.spec.groups(self.k), -(-self.k // BLOCK)

        def plain(tensor: Tensor | None, count: int) -> Tensor | None:
            return None if tensor is None else layout.unpack_groups(tensor, self.n, count)

        g_idx = None
        if self.perm is not None:
            logical = torch.empty_like(codes)
            logical[:, self.perm] = codes
            codes = logical
            g_idx = torch.empty(self.k, dtype=torch.int32, device=codes.device)
            g_idx[self.perm] = (torch.arange(self.k, device=codes.device) // self.group).int()
        return PlainWeight(
            self.spec, codes, layout.unpack_groups(self.scale, self.n, groups),
            plain(self.zero, groups),
            plain(self.block_scale, blocks), plain(self.block_zero, blocks), g_idx,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] of dtype, by the fastest row for it; computed in float32."""
        from ..ops.pack import dequantize  # the ops stand above the weights

        return dequantize(self, dtype)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by the names a state_dict should use; `from_tensors` is the
        inverse."""
        names = ("codes", "scale", "zero", "block_scale", "block_zero", "table", "perm")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    @classmethod
    def from_tensors(
        cls, spec: QuantSpec, n: int, k: int, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        """Raises ValueError for a missing, unexpected or ill-shaped tensor, and for scales or
        minima that are not finite."""
        wanted = cls.empty(spec, n, k, device="meta").tensors()
        if set(wanted) != set(tensors):
            raise ValueError(
                f"PackedWeight: {spec} has the tensors {sorted(wanted)}, got {sorted(tensors)}"
            )
        for name, want in wanted.items():
            got = tensors[name]
            if (got.dtype, got.shape) != (want.dtype, want.shape):
                raise ValueError(
                    f"PackedWeight: {name} of {spec} [{n}, {k}] must be {want.dtype} "
                    f"{list(want.shape)}, "
                    f"got {got.dtype} {list(got.shape)}"
                )
        check_finite(tensors, f"PackedWeight: {spec} [{n}, {k}]: ")
        return cls(spec, n, k, **tensors)

    def to(self, device: torch.device | str) -> PackedWeight:
        """A copy of the bytes on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self

        def moved(tensor: Tensor) -> Tensor:
            if tensor.dtype.itemsize > 1 or not tensor.is_floating_point():
                return tensor.to(device)
            return tensor.view(torch.uint8).to(device).view(tensor.dtype)  # torch copies no float8

        there: dict[str, Any] = {name: moved(t) for name, t in self.tensors().items()}
        return replace(self, **there)

    def slice_rows(self, start: int, stop: int) -> PackedWeight:
        """Rows start..stop as views. Both must be multiples of 64 (stop may be n). Raises
        ValueError."""
        if (
            not 0 <= start < stop <= self.n
            or start % UNIT_ROWS
            or (stop % UNIT_ROWS and stop != self.n)
        ):
            raise ValueError(
                f"slice_rows: {start} to {stop} of {self.n} must be multiples of {UNIT_ROWS}"
            )
        np = layout.padded_n(stop)
        blocks = slice(start // UNIT_ROWS, np // UNIT_ROWS)
        cut: dict[str, Any] = {
            name: t[blocks]
            for name, t in self.tensors().items()
            if name not in ("codes", "table", "perm")
        }
        return replace(self, n=stop - start, codes=self.codes[start:np], **cut)

    def slice_cols(self, start: int, stop: int) -> PackedWeight:
        """Columns start..stop, copied. Both must be multiples of 16 and of the group (two-level: of
        256; stop may be k).

        Raises ValueError, also with act_order, whose packed columns are not in logical order.
        """
        if self.perm is not None:
            raise ValueError(
                "slice_cols: the columns of an act-order weight are sorted by group; slice "
                "the plain weight"
            )
        step = (
            BLOCK
            if self.spec.two_level
            else UNIT_COLS
            if self.spec.group_size == -1
            else self.group
        )
        if not 0 <= start < stop <= self.k or start % step or (stop % step and stop != self.k):
            raise ValueError(
                f"slice_cols: {start} to {stop} of {self.k} must be multiples of {step}"
            )
        out = PackedWeight.empty(self.spec, self.n, stop - start, device=self.device)
        unit = 128 * self.spec.bits
        blocks = self.codes.shape[0] // UNIT_ROWS
        width = out.spec.padded_k(out.k) // UNIT_COLS
        first = start // UNIT_COLS
        out.codes.view(blocks, width, unit).copy_(
            self.codes.view(blocks, -1, unit)[:, first : first + width]
        )
        for name in ("scale", "zero", "block_scale", "block_zero"):
            source, room = getattr(self, name), getattr(out, name)
            if source is None:
                continue
            per = BLOCK if name.startswith("block") else self.group
            at = 0 if self.spec.group_size == -1 else start // per
            raw = torch.uint8 if source.dtype.itemsize == 1 else source.dtype
            room.view(raw).copy_(source.view(raw)[:, at : at + room.shape[1]])
        return out


def pack_codes(codes: Tensor, bits: int, group: int, two_level: bool) -> Tensor:
    """Packs by the fastest row for this device; `layout.pack` is the definition."""
    from ..ops.pack import pack

    return pack(codes, bits, group, two_level)
