"""What a checkpoint stores of a linear layer of vLLM, said by our readers of its format: from the
headers of its files before loading, and as packed weights after it. Nothing here imports vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.formats import quantized_format
from ..checkpoints.quantized import Part, QuantizedFormat, StoredMatrix
from ..checkpoints.safetensors_directory import DTYPES, StateDict
from ..quant import PackedWeight
from . import weights
from .layer import Names

METHODS = ("gptq", "awq", "compressed-tensors")


@dataclass(frozen=True)
class Dims:
    """Which dimension of a stored tensor runs along the rows of the matrix and which along its
    columns, and the one of them that is packed into int32 words. None: none does."""

    rows: int | None
    columns: int | None
    packed: int | None = None


# By the name of the tensor: "qweight" of GPTQ and AWQ differ.
_DIMS: dict[str, dict[str, Dims]] = {
    "gptq": {
        "qweight": Dims(1, 0, 0),
        "qzeros": Dims(1, 0, 1),
        "scales": Dims(1, 0),
        "g_idx": Dims(None, 0),
    },
    "awq": {"qweight": Dims(1, 0, 1), "qzeros": Dims(1, 0, 1), "scales": Dims(1, 0)},
    "compressed-tensors": {
        "weight": Dims(0, 1),
        "weight_packed": Dims(0, 1, 1),
        "weight_scale": Dims(0, 1),
        "weight_zero_point": Dims(0, 1, 0),
        "weight_g_idx": Dims(None, 1),
    },
}
# Says the shape of the matrix, which a rank knows: not loaded.
SHAPE = "weight_shape"


@dataclass
class Header:
    """Names, shapes and types of a checkpoint's tensors, as a TensorSource without values."""

    where: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: str) -> Header:
        """metadata: name -> {"dtype": as safetensors names it, "shape": list}."""
        header = cls(where)
        for name, entry in metadata.items():
            if entry.get("dtype") in DTYPES:
                header.shapes[name] = tuple(entry["shape"])
                header.dtypes[name] = DTYPES[entry["dtype"]]
        return header

    def renamed(self, rename: Callable[[str], str | None]) -> Header:
        names = {name: new for name in self.shapes if (new := rename(name)) is not None}
        return Header(
            self.where,
            {new: self.shapes[name] for name, new in names.items()},
            {new: self.dtypes[name] for name, new in names.items()},
        )

    def _no_values(self, *_: Any) -> Tensor:
        raise CheckpointError(f"{self.where}: only the header of its files is known")

    rows = columns = whole = _no_values


@dataclass(frozen=True)
class Stored:
    """The tensors of one rank's part [n, k] of a layer, which may be several matrices of the
    checkpoint one after the other.

    path: of the first of these. parts: name of the tensor -> what it must be for [n, k].
    group_size: columns per scale, -1 for a scale per row.
    """

    path: str
    n: int
    k: int
    parts: dict[str, Part]
    dims: dict[str, Dims]
    bits: int
    group_size: int

    @property
    def names(self) -> Names:
        if "qweight" in self.parts:
            return Names("qweight", "scales", "qzeros", "g_idx")
        codes = "weight" if "weight" in self.parts else "weight_packed"
        return Names(codes, "weight_scale", "weight_zero_point", "weight_g_idx")

    @property
    def act_order(self) -> bool:
        return self.names.columns in self.parts


class Checkpoint:
    """A checkpoint's `quantization_config`, and its header once that is known.

    Raises CheckpointError (a ValueError) for a method that is none of gptq, awq and
    compressed-tensors, and for settings that no reader supports.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "the checkpoint") -> None:
        method = raw.get("quant_method")
        if method not in METHODS:
            raise CheckpointError(
                f"{where}: quantization_config: quant_method {method!r} is not served in vLLM; "
                f"served are {', '.join(METHODS)}"
            )
        self.raw, self.where, self.method = copy.deepcopy(dict(raw)), where, str(method)
        self.header = Header(where)
        self._format = self._read()

    def _read(self) -> QuantizedFormat:
        found = quantized_format({"quantization_config": self.raw}, self.where)
        assert found is not None
        return found

    def rename(self, rename: Callable[[str], str | None]) -> None:
        """Names of modules and tensors as vLLM's model has them."""

        def listed(names: Any) -> Any:
            if not isinstance(names, list):
                return names
            # Classes and patterns stay.
            return [
                new
                for name in names
                if (new := rename(name) if "." in name and not name.startswith("re:") else name)
                is not None
            ]

        self.header = self.header.renamed(rename)
        for key in ("ignore", "modules_to_not_convert"):
            if key in self.raw:
                self.raw[key] = listed(self.raw[key])
        for group in (self.raw.get("config_groups") or {}).values():
            group["targets"] = listed(group.get("targets"))
        self._format = self._read()

    def layer(self, paths: Iterable[str], n: int, k: int) -> Stored | None:
        """How the matrices at `paths`, fused by their rows, are stored for n rows and k columns;
        None where they are dense. Raises CheckpointError where they are not stored alike."""
        found = {path: self._parts(path, n, k) for path in paths}
        first, *others = found
        for other in others:
            if found[other] != found[first]:
                raise CheckpointError(
                    f"{self.where}: vLLM computes {first} and {other} as one, but they are "
                    f"stored as {_told(found[first])} and as {_told(found[other])}"
                )
        parts = found[first]
        if parts is None:
            return None
        bits, group_size = self._numbers(first)
        return Stored(first, n, k, parts, _DIMS[self.method], bits, group_size)

    def _numbers(self, path: str) -> tuple[int, int]:
        """bits and group size, told by the shapes that a very large matrix would have."""
        n, k = 1 << 10, 1 << 30  # groups of up to 2^15 columns can be told apart
        parts, dims = self._parts(path, n, k), _DIMS[self.method]
        assert parts is not None
        bits, group_size = 8, -1
        for name, part in parts.items():
            where = dims[name]
            if name in ("scales", "weight_scale") and len(part.shape) == 2:
                groups = part.shape[where.columns or 0]
                group_size = -1 if groups == 1 else -(-k // groups)
            if name in ("qweight", "weight_packed"):
                assert where.packed is not None
                size = n if where.packed == where.rows else k
                bits = part.shape[where.packed] * 32 // size
        return bits, group_size

    def _parts(self, path: str, n: int, k: int) -> dict[str, Part] | None:
        parts = self._format.parts(self.header, path, n, k, "Linear")
        if parts is None:
            return None
        return {
            name: part
            for full, part in parts.items()
            if (name := full.removeprefix(f"{path}.")) != SHAPE
        }

    def open(self, stored: Stored, tensors: Mapping[str, Tensor]) -> StoredMatrix:
        """The matrix of the tensors that have been loaded, by their names in `stored`."""
        named = {f"{stored.path}.{name}": tensor for name, tensor in tensors.items()}
        named[f"{stored.path}.{SHAPE}"] = torch.tensor([stored.n, stored.k])
        for name, tensor in named.items():
            if tensor.dtype == torch.float32:  # what any float type was loaded as
                named[name] = weights.narrowest(tensor)
        source = StateDict(named, f"{self.where}: {stored.path}")
        return self._format.open(source, stored.path, stored.n, stored.k, "Linear")


def _told(parts: dict[str, Part] | None) -> str:
    if parts is None:
        return "dense"
    return ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())


def rank_columns(matrix: StoredMatrix, rank: int, ranks: int) -> tuple[PackedWeight, Tensor | None]:
    """One rank's columns of a matrix that may be in act-order, and where in its x they lie; None if
    they are in order. Raises NoKernel where they are, and are not whole groups."""
    k = matrix.k // ranks
    start, stop = rank * k, (rank + 1) * k
    with torch.device("cpu"):
        plain = matrix.read(0, matrix.n)
        if plain.g_idx is not None:
            cut, columns = weights.columns_by_position(plain, start, stop)
            return cut.pack(), columns
        group = plain.spec.group_size
        weights.check_split("a layer", k, group, matrix.k)
        groups = slice(None) if group == -1 else slice(start // group, stop // group)
        zero = None if plain.zero is None else plain.zero[:, groups].contiguous()
        cut = replace(
            plain,
            codes=plain.codes[:, start:stop].contiguous(),
            scale=plain.scale[:, groups].contiguous(),
            zero=zero,
        )
        return cut.pack(), None
