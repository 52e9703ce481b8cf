"""Inputs of a case, in enough copies that none is in a cache when its turn comes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..quant.spec import QuantSpec
from ..quant.weight import PackedWeight, PlainWeight

# Bytes that the copies of one variant may take; a single copy may not pass it either.
MEMORY_LIMIT = 1 << 30
_BLOCK_ROWS = 4096  # rows of a weight that are made at a time


class TooLarge(Exception):
    """One copy of an input passes the limit of memory."""


@dataclass(frozen=True)
class Rotation:
    """How many copies of its inputs a variant goes through.

    cache: bytes of the last-level cache, which the copies pass twice over where `limit`, bytes of
    memory, lets them.
    """

    cache: int
    limit: int = MEMORY_LIMIT

    def copies(self, nbytes: int) -> int:
        """Copies of inputs of nbytes. Raises TooLarge where not even one fits."""
        if nbytes > self.limit:
            raise TooLarge(
                f"one copy takes {nbytes / 1e6:.0f} MB, and the limit is {self.limit / 1e6:.0f} MB"
            )
        return max(1, min(-(-2 * self.cache // nbytes), self.limit // nbytes))


@dataclass(frozen=True)
class Baseline:
    """A counterpart of torch. call: i -> its result on copy i of its inputs. check: takes what it
    is and the result of call 0, and raises CheckError where that is not what its inputs give."""

    call: Callable[[int], Any]
    check: Callable[[str, Any], None]


@dataclass
class Problem:
    """A case made concrete.

    ours: call i, on copy i of the inputs. baselines: what torch has. left_out: why a baseline is
    not among them. check: compares a result of `ours` with the reference; raises CheckError.
    nbytes, ops: what one call has to read from memory, and to compute. peak: the ceiling of its
    arithmetic, "int8" or "float32". rotated: bytes of all copies.
    """

    ours: Callable[[int], Any]
    check: Callable[[], None]
    nbytes: float
    ops: float
    peak: str
    rotated: int
    baselines: dict[str, Baseline] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add_baseline(self, name: str, make: Callable[[], Baseline]) -> None:
        """Makes a baseline, or notes that its inputs are too large."""
        try:
            self.baselines[name] = make()
        except TooLarge as error:
            self.left_out[name] = str(error)


def turns(items: Sequence[Any], call: Callable[..., Any]) -> Callable[[int], Any]:
    """i -> call(*items[i]), round and round."""
    count = len(items)
    return lambda i: call(*items[i % count])


def random_bytes(count: int, seed: int = 0) -> Tensor:
    """[count] uint8, all values. Whole words are drawn: bytes one by one take eight times as
    long."""
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    return words.view(torch.uint8)[:count]


def random_floats(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, 65521 of them over and over: what values are changes no time. That is a
    prime, so that no rows or heads are alike and mixing them up shows in a check."""
    count = 1
    for size in shape:
        count *= size
    some = torch.randn(65521, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.empty(count, dtype=dtype)
    whole = count // some.numel() * some.numel()
    out[:whole].view(-1, some.numel()).copy_(some)
    out[whole:] = some[: count - whole]
    return out.view(shape)


def activations(m: int, k: int) -> Tensor:
    """[m, k] float32 with outliers, as activations have them."""
    x = random_floats((m, k), torch.float32)
    x[:, ::37] *= 8
    return x


def random_weight(spec: QuantSpec, n: int, k: int) -> PackedWeight:
    """Random codes over all values, scales over an octave. Codes are random bytes: quantizing
    floats would take longer than all that is measured."""
    packed = PackedWeight.empty(spec, n, k)
    for start in range(0, n, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, n - start)
        packed.write_rows(start, _random_rows(spec, rows, k, seed=start))
    return packed


def _random_rows(spec: QuantSpec, n: int, k: int, seed: int) -> PlainWeight:
    groups, blocks = spec.groups(k), -(-k // 256)
    generator = torch.Generator().manual_seed(seed)

    def floats(columns: int, low: float, high: float) -> Tensor:
        return torch.rand(n, columns, generator=generator) * (high - low) + low

    codes = random_bytes(n * k, seed).view(n, k)
    if spec.bits < 8:
        codes &= (1 << spec.bits) - 1
    fields: dict[str, Tensor] = {}
    if spec.two_level:
        fields["scale"] = floats(groups, 64, 127).to(torch.int8)
        fields["block_scale"] = floats(blocks, 1e-4, 2e-4).half()
        if spec.zero == "minimum":
            fields["zero"] = floats(groups, 1, 127).to(torch.int8)
            fields["block_zero"] = floats(blocks, 1e-3, 2e-3).half()
    else:
        fields["scale"] = floats(groups, 0.005, 0.01).to(spec.scale_dtype)
        if spec.zero == "minimum":
            fields["zero"] = floats(groups, 0.02, 0.08).to(spec.scale_dtype)
        elif spec.zero == "integer":
            fields["zero"] = random_bytes(n * groups, seed + 1).view(n, groups) & (
                (1 << spec.bits) - 1
            )
    return PlainWeight(spec, codes, **fields)


def weight_copies(weight: PackedWeight, rotation: Rotation) -> list[PackedWeight]:
    """The weight and clones of it: caches tell addresses apart, not contents."""
    count = rotation.copies(weight.nbytes)
    tensors = weight.tensors()
    clones = [{name: t.clone() for name, t in tensors.items()} for _ in range(count - 1)]
    return [weight, *(PackedWeight(weight.spec, weight.n, weight.k, **own) for own in clones)]


def float_copies(
    shape: tuple[int, ...], dtype: torch.dtype, rotation: Rotation
) -> tuple[Tensor, ...]:
    """Tensors of a shape, in as many copies as the rotation asks for."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return random_floats((rotation.copies(nbytes), *shape), dtype).unbind()
