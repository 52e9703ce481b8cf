"""Where tensors of a transformers checkpoint come from: safetensors files, or a model in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError

# The names of safetensors' dtypes that torch can hold. Newer files know more (F4, F6_E2M3, ...).
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSource(Protocol):
    """Tensors by name, read when asked for.

    shapes, dtypes: of all tensors, known without reading any. where: for messages.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    @property
    def where(self) -> str: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[start:stop] of the first dimension."""

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[:, start:stop] of a matrix."""

    def whole(self, name: str) -> torch.Tensor: ...


class SafetensorsDirectory:
    """Tensors of model.safetensors, or of the shards that model.safetensors.index.json lists,
    memory-mapped.

    The files stay open until `stack` is closed. single: the file if there is no index. Raises
    CheckpointError, naming file and tensor, for an index that is not one, a shard that is missing,
    damaged, truncated or outside the directory, a tensor that two shards have or none has, and a
    dtype that torch does not know.
    """

    def __init__(self, directory: Path, stack: ExitStack, single: str = SINGLE) -> None:
        self.where = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        index = directory / INDEX
        listed = _weight_map(index) if index.exists() else None
        if listed is not None:
            names = sorted(set(listed.values()))
        elif (directory / single).exists():
            names = [single]
        else:
            raise CheckpointError(f"{directory}: expected {single} or {INDEX}, found neither")
        for name in names:
            self._open(directory / name, stack)
        for name, shard in (listed or {}).items():
            if name not in self._paths:
                raise CheckpointError(f"{index}: lists {name}, but {shard} does not have it")
            if self._paths[name].name != shard:
                raise CheckpointError(
                    f"{index}: lists {name} in {shard}, but it is in {self._paths[name].name}"
                )

    @classmethod
    def of_files(cls, files: Iterable[Path], where: str, stack: ExitStack) -> SafetensorsDirectory:
        """The tensors of these files alone, whatever else lies beside them. where: for messages."""
        source = cls.__new__(cls)
        source.where = where
        source.shapes, source.dtypes, source._files, source._paths = {}, {}, {}, {}
        for path in files:
            source._open(path, stack)
        return source

    def _open(self, path: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
        for name in names:
            if name in self._paths:
                raise CheckpointError(f"tensor {name} is both in {self._paths[name]} and in {path}")
            part = file.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}"
                )
            shape = tuple(part.get_shape())
            # A dimension of 0 makes all others fit the file.
            if math.prod(size or 1 for size in shape) >= 1 << 63:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(shape)}, expected fewer than 2^63 "
                    "elements"
                )
            self._files[name], self._paths[name] = file, path
            self.shapes[name], self.dtypes[name] = shape, DTYPES[dtype]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._files[name].get_slice(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._files[name].get_slice(name)[:, start:stop]

    def whole(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor names, from model.safetensors.index.json."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise CheckpointError(f"{index}: expected weight_map, from tensor names to file names")
    if not listed:
        raise CheckpointError(f"{index}: weight_map is empty")
    for name, shard in listed.items():
        # A bare name: what lies elsewhere is not part of this checkpoint, even through a link.
        if shard in ("", ".", "..") or any(c in "/\\\0" for c in shard) or not _is_text(shard):
            raise CheckpointError(
                f"{index}: a shard outside the directory: {shard!r} (of tensor {name})"
            )
    return listed


def _is_text(name: str) -> bool:
    """Whether UTF-8 can hold it: JSON can spell halves of surrogate pairs."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


class StateDict:
    """Tensors of a transformers model that is in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.where = where
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._real(name)[start:stop].detach().cpu()

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._real(name)[:, start:stop].detach().cpu()

    def whole(self, name: str) -> torch.Tensor:
        return self._real(name).detach().cpu()

    def _real(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise CheckpointError(f"{self.where}: tensor {name} is on meta: it has no values")
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be read as JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
