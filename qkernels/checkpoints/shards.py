"""Writing directories: all of one, or nothing; and safetensors in shards."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .safetensors_directory import INDEX, SINGLE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size_in_bytes(size: int | str) -> int:
    """ "5GB", "300MB", "1GiB" or a number of bytes. Raises ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"max_shard_size must be like '5GB', or bytes, got {size!r}")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def check_target(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError for a path that is a file, or a directory that holds something unless
    `overwrite`."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: expected a directory, it is a file")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path}: the directory is not empty (overwrite=True replaces it)")


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `path` to write to, which becomes `path` in the end: an error, or a crash,
    leaves what was there before. Raises FileExistsError as `check_target` does.
    """
    path = Path(os.path.abspath(path))
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


class ShardWriter:
    """Writes safetensors one after the other: model.safetensors, or shards with an index if they
    are larger than a shard. At most one shard is in memory."""

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self._directory, self._limit = directory, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: kept until its shard is written; it must not change."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # safetensors writes no views
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Writes the last shard and the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard(0).rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._shard(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _shard(self, index: int) -> Path:
        return self._directory / f"shard-{index}.partial"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
