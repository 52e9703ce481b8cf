"""Writing directories: all of one, or nothing; and safetensors in shards."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_directory import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 8 << 20
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
    `overwrite`, which replaces directories of a model only: a config.json, and no directories."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: expected a directory, it is a file")
    held = sorted(path.iterdir()) if path.is_dir() else []
    if held and not overwrite:
        raise FileExistsError(f"{path}: the directory is not empty (overwrite=True replaces it)")
    if held and not (path / "config.json").is_file():
        raise FileExistsError(f"{path}: not replaced: it is no model, without a config.json")
    if inner := [entry.name for entry in held if entry.is_dir()]:
        raise FileExistsError(f"{path}: not replaced: the directory {inner[0]} in it would be lost")


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `path` to write to, which becomes `path` in the end: an error, or a crash,
    leaves what was there before. Raises FileExistsError as `check_target` does.
    """
    path = path.resolve()  # a link stays, and what it points to is written
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    partial, old = work / "new", work / "old"
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    """A tensor in the spool file of a shard."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class ShardWriter:
    """Writes safetensors one after the other: model.safetensors, or shards with an index if they
    are larger than a shard.

    Nothing is kept in memory: tensors go to a spool file as they come, and are copied behind their
    header when the shard is full. They lie in order of falling element sizes, so that each begins
    at a multiple of its own, as readers that map the file need.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self._directory, self._limit = directory, max_shard_bytes
        self._pending: dict[str, _Entry] = {}
        self._shards: list[list[str]] = []
        self._spool = (directory / "spool.partial").open("w+b")
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        start = self._spool.tell()
        if self._pending and start + tensor.nbytes > self._limit:
            self._flush()
            start = 0
        dtype = _NAMES[tensor.dtype]
        self._pending[name] = _Entry(dtype, tuple(tensor.shape), start, tensor.nbytes)
        if tensor.nbytes:
            self._spool.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Writes the last shard and the index."""
        self._flush()
        self._spool.close()
        (self._directory / "spool.partial").unlink()
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
        entries = sorted(self._pending.items(), key=lambda e: (-DTYPES[e[1].dtype].itemsize, e[0]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, entry in entries:
            offsets = [at, at + entry.nbytes]
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
            at += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._shard(len(self._shards)).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, entry in entries:
                self._spool.seek(entry.start)
                for done in range(0, entry.nbytes, _COPY_BYTES):
                    file.write(self._spool.read(min(_COPY_BYTES, entry.nbytes - done)))
        self._shards.append(list(self._pending))
        self._pending = {}
        self._spool.seek(0)
        self._spool.truncate()
