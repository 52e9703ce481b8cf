"""What the readers of quantized transformers checkpoints share.

A format says which tensors a matrix `<path>` of the model has, checks them, and turns them into
`PlainWeight`, a block of rows at a time. It knows nothing of models, nor of the packed layout.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import PlainWeight, QuantSpec
from ..quant.spec import FLAT_SCALES
from ..quant.weight import check_g_idx
from .errors import CheckpointError
from .safetensors_directory import TensorSource

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALE_NAMES = {dtype: name for name, dtype in FLAT_SCALES.items()}


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized matrix. dtypes: those it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [n, k] of a checkpoint. read(start, stop): its rows from start to stop."""

    spec: QuantSpec
    n: int
    k: int
    read: Callable[[int, int], PlainWeight]


class QuantizedFormat(ABC):
    """A format of quantized checkpoints as one checkpoint configures it.

    name: its `quant_method`. Made from the contents of `quantization_config`; raises
    CheckpointError for anything there that would change the values and is not supported.
    """

    name: str

    @abstractmethod
    def __init__(self, raw: Mapping[str, Any], where: str) -> None: ...

    @abstractmethod
    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        """The tensors of the matrix at `path`, as its settings want them; None if it is dense.

        kind: "Linear" or "Embedding". Optional tensors are there only if the source has them.
        """

    @abstractmethod
    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        """The matrix whose `parts` have been found there. Raises CheckpointError for values that
        mean nothing."""

    def act(self, path: str, kind: str) -> str:
        """What the checkpoint says of the activations of a quantized matrix: "int8", quantized at
        run time, or "float"."""
        return "float"

    def is_padding(self, source: TensorSource, name: str) -> bool:
        """Whether a tensor that the model does not have changes nothing."""
        return False


class Settings:
    """The contents of `quantization_config`, or a part of them, read key by key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where} must be a mapping, got {raw!r}")
        self.raw, self.where = raw, where

    def fail(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} must be {expected}, got {value!r}")

    def integer(self, keys: Iterable[str], allowed: tuple[int, ...] | None = None) -> int:
        """The value of the first of `keys` that is there."""
        name, *_ = keys = tuple(keys)
        for key in keys:
            value = self.raw.get(key)
            if value is not None:
                name = key
                break
        expected = "an integer" if allowed is None else f"one of {', '.join(map(str, allowed))}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, value, expected)
        if allowed is not None and value not in allowed:
            raise self.fail(name, value, expected)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: str, *allowed: str) -> str:
        value = self.raw.get(key)
        if value is None:
            return default
        value = getattr(value, "value", value)  # of an enumeration, in a configuration object
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.fail(key, value, " or ".join(allowed))
        return value.lower()

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise self.fail(key, value, "a list of names")
        return tuple(value)

    def group_size(self, keys: Iterable[str]) -> int:
        value = self.integer(keys)
        if value != -1 and (value <= 0 or value % 16):
            raise self.fail("group_size", value, "-1 or a positive multiple of 16")
        return value


def names_path(names: Iterable[str], path: str) -> bool:
    """Whether one of `names` is `path`, or a run of its dotted parts, as transformers matches
    modules_to_not_convert."""
    return any(re.search(rf"(?:^|\.){re.escape(name)}(?:\.|$)", path) for name in names if name)


def check_dtypes(source: TensorSource, parts: Mapping[str, Part]) -> None:
    """Raises CheckpointError for a tensor of another dtype than its format stores."""
    for name, part in parts.items():
        if name in source.shapes and source.dtypes[name] not in part.dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in part.dtypes)
            given = str(source.dtypes[name]).removeprefix("torch.")
            raise CheckpointError(f"{source.where}: tensor {name} must be {wanted}, got {given}")


def finite(source: TensorSource, name: str, tensor: Tensor) -> Tensor:
    """tensor, unless it has values that are not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{source.where}: tensor {name} has values that are not finite")
    return tensor


def group_index(
    source: TensorSource, name: str, group_size: int, k: int, required: bool
) -> Tensor | None:
    """The g_idx of a matrix, [K] int32; None if columns are grouped by position.

    Raises CheckpointError where `required` and there is none, and for groups that are out of range
    or have more or fewer columns than a group.
    """
    if name not in source.shapes:
        if required:
            raise CheckpointError(
                f"{source.where}: tensor {name} is missing, and the columns are in act-order"
            )
        return None
    index = source.whole(name)
    group = k if group_size == -1 else group_size
    try:
        check_g_idx(index, group)
    except ValueError as error:
        raise CheckpointError(f"{source.where}: tensor {name}: {error}") from error
    by_position = torch.arange(k, dtype=index.dtype) // group
    return None if torch.equal(index, by_position) else index.to(torch.int32)


def make_spec(
    source: TensorSource,
    path: str,
    bits: int,
    group_size: int,
    k: int,
    scale: torch.dtype,
    zeros: bool,
    act_order: bool = False,
) -> QuantSpec:
    """The QuantSpec of a matrix of k columns with flat scales; a combination that does not exist
    becomes a CheckpointError."""
    try:
        return QuantSpec(
            bits,
            # One group is the whole row: packing need not pad it to a size that a file made up.
            group_size if group_size < k else -1,
            SCALE_NAMES[scale],
            "integer" if zeros else "symmetric",
            act_order=act_order,
        )
    except ValueError as error:
        raise CheckpointError(f"{source.where}: {path}: {error}") from error
