"""GGUF files, v2 and v3, little-endian: the tensors of a memory-mapped file.

Nothing is decoded before it is asked for. `gguf_header` reads the header, `gguf_blocks` says what
the types of tensors mean.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch

from ..quant.spec import QuantSpec
from ..quant.weight import PlainWeight
from .errors import CheckpointError
from .gguf_blocks import BY_NAME, DENSE, QUANTIZED, BlockType, refused
from .gguf_fields import Plain
from .gguf_header import Metadata, StringArray, TensorInfo, read_header, shorten

__all__ = ["GGUFFile", "Metadata", "StringArray", "TensorInfo"]

# Dense tensors smaller than this are copied: a mapping of their own would cost more.
COPY_BELOW = 1 << 16
# Stored bytes that are decoded at a time: what decoding needs beside its result stays this small.
_DECODE_BYTES = 1 << 18


class GGUFFile:
    """A memory-mapped GGUF file.

    path: a regular file. Raises `CheckpointError` for anything that is not a well-formed
    little-endian GGUF file of version 2 or 3. Usable as a context manager. As with any mapping, the
    process dies (SIGBUS) if another one truncates the file while it is being read; each access
    checks the file's size first, which narrows that to the access itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if sys.byteorder != "little":
            raise CheckpointError(
                f"{self.path}: GGUF files are read on little-endian machines only"
            )
        self._file, self._map = self._open()
        try:
            self.version, self.metadata, self.tensors = read_header(self.path, self._map)
        except BaseException:
            self.close()
            raise

    def _open(self) -> tuple[Any, mmap.mmap]:
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
                what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise CheckpointError(f"{self.path}: expected a GGUF file, got {what}")
            file = open(self.path, "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.path}: expected a GGUF file, got an error: {reason}"
            ) from error
        try:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                start = file.read(4)
                raise CheckpointError(
                    f"{self.path}: expected a GGUF file of at least 24 bytes, got {size} bytes "
                    f"starting with {start!r}"
                )
            return file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file: no tensor can be taken from it afterwards. What was taken, and the
        metadata, stay valid; the mapping goes with the last of them."""
        self._file.close()

    def __repr__(self) -> str:
        sizes = f"{len(self.metadata)} keys, {len(self.tensors)} tensors"
        return f"GGUFFile({self.path!r}, version {self.version}, {sizes})"

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: no tensor {shorten(name)} among its {len(self.tensors)}"
            )
        if self._file.closed:
            raise CheckpointError(f"{self.path}: tensor {shorten(name)}: the file has been closed")
        info = self.tensors[name]
        size = os.fstat(self._file.fileno()).st_size
        if info.offset + info.nbytes > size:  # reading on would be a SIGBUS
            raise CheckpointError(
                f"{self.path}: tensor {shorten(name)}: the file shrank to {size} bytes since it "
                "was opened"
            )
        return info

    def dense(self, name: str) -> torch.Tensor:
        """The float tensor `name`, in the file's dtype (float32, float16 or bfloat16) and its
        `shape`.

        No copy from 64 KiB on: the storage is a private mapping of the file, whose pages are read
        when touched and shared with the page cache. Writing to the tensor changes this tensor only,
        never the file or a second `dense(name)`. Raises `CheckpointError` for an unknown name and
        for other types.
        """
        info = self._info(name)
        dtype = BY_NAME[info.type].dtype
        if dtype is None:
            hint = "; read it with plain_blocks" if info.type in QUANTIZED else ""
            raise CheckpointError(
                f"{self.path}: tensor {shorten(name)}: expected a type among {', '.join(DENSE)}, "
                f"got {info.type}{hint}"
            )
        buffer: bytearray | mmap.mmap
        if info.nbytes < COPY_BELOW:
            buffer, skip = bytearray(self._map[info.offset : info.offset + info.nbytes]), 0
        else:
            # A mapping of its own, since the large one is read-only and torch would crash when
            # writing to it.
            skip = info.offset % mmap.ALLOCATIONGRANULARITY
            buffer = mmap.mmap(
                self._file.fileno(),
                info.nbytes + skip,
                access=mmap.ACCESS_COPY,
                offset=info.offset - skip,
            )
        return torch.frombuffer(buffer, dtype=dtype, count=prod(info.shape), offset=skip).view(
            info.shape
        )

    def plain_blocks(
        self,
        name: str,
        rows: int,
        row_order: np.ndarray | torch.Tensor | None = None,
        buffer: np.ndarray | None = None,
    ) -> Iterator[tuple[int, PlainWeight]]:
        """The quantized tensor `name`, exactly, as (start row, `PlainWeight` of up to `rows` rows),
        in order.

        rows: rows per block, at least 1. row_order: integers [R]; row i of the result is row
        row_order[i] of the file (default: all rows as they are); indices may repeat. Tensors of
        more than two dimensions (experts) count as their rows one after the other. A block needs
        its own size plus a few percent while it is decoded (with row_order plus the size of its
        rows in the file); the file's pages are given back to the system after it. buffer: uint8
        [at least rows * columns], in which the codes of each block replace those of the one before;
        without it every block has memory of its own.

        Raises `CheckpointError` for an unknown name, types that cannot be read, scales that are not
        finite; `ValueError` for bad rows or row_order; all but the scales before the first block.
        """
        info = self._info(name)
        block = BY_NAME[info.type]
        if block.decode is None or block.spec is None:
            hint = "; read it with dense" if info.type in DENSE else ""
            raise CheckpointError(
                f"{self.path}: tensor {shorten(name)}: expected a type among "
                f"{', '.join(QUANTIZED)}, got {info.type}{hint}"
            )
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"plain_blocks({name!r}): expected rows >= 1, got {rows!r}")
        order = None
        n = prod(info.shape[:-1])
        if row_order is not None:
            order = np.asarray(row_order)
            if order.ndim != 1 or order.dtype.kind not in "iu":
                raise ValueError(
                    f"plain_blocks({name!r}): expected a one-dimensional integer row_order, got "
                    f"{order.dtype} {order.shape}"
                )
            if order.size and not (order.min() >= 0 and order.max() < n):
                raise ValueError(
                    f"plain_blocks({name!r}): expected row_order in [0, {n}), got {order.min()} "
                    f"to {order.max()}"
                )
        if buffer is not None:
            needed = min(rows, n if order is None else order.size) * info.shape[-1]
            if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size < needed:
                raise ValueError(
                    f"plain_blocks({name!r}): expected a buffer of uint8 [{needed} or more], got "
                    f"{buffer.dtype} {list(buffer.shape)}"
                )
        return self._decode_blocks(info, block, rows, order, buffer)

    def _decode_blocks(
        self,
        info: TensorInfo,
        block: BlockType,
        rows: int,
        order: np.ndarray | None,
        buffer: np.ndarray | None,
    ) -> Iterator[tuple[int, PlainWeight]]:
        spec, decode = block.spec, block.decode
        assert spec is not None and decode is not None
        count = info.shape[-1] // block.elements
        unit = "group" if spec.group_size == block.elements else "block"
        n = prod(info.shape[:-1])
        total = n if order is None else order.size
        for start in range(0, total, rows):
            stop = min(start + rows, total)
            self._info(info.name)  # still there?
            stored = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset).reshape(
                n, count, block.nbytes
            )
            size = (stop - start) * info.shape[-1]
            codes = np.empty(size, np.uint8) if buffer is None else buffer[:size]
            plain = block.empty(stop - start, count, codes)
            step = max(1, _DECODE_BYTES // (count * block.nbytes))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                raw = stored[first:last] if order is None else stored[order[first:last]]
                if (bad := refused(block, raw)) is not None:
                    row = first + bad.row if order is None else int(order[first + bad.row])
                    raise CheckpointError(
                        f"{self.path}: tensor {shorten(info.name)} ({info.type}): row {row}, "
                        f"{unit} {bad.block}: {bad.reason}"
                    )
                decode(raw, plain.rows(first - start, last - start))
            touched = (
                (start, stop)
                if order is None
                else (int(order[start:stop].min()), int(order[start:stop].max()) + 1)
            )
            del raw, stored
            row_bytes = count * block.nbytes
            self._forget(info.offset + touched[0] * row_bytes, info.offset + touched[1] * row_bytes)
            weight = _plain_weight(spec, plain)
            del codes, plain
            yield start, weight
            del weight

    def _forget(self, start: int, stop: int) -> None:
        """Unmaps whole pages within [start, stop), so that a model read once does not stay resident
        twice. They remain in the page cache; reading them again is a soft fault."""
        if hasattr(self._map, "madvise"):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _plain_weight(spec: QuantSpec, plain: Plain) -> PlainWeight:
    def tensor(values: np.ndarray | None, dtype: torch.dtype | None) -> torch.Tensor | None:
        if values is None or dtype is None:
            return None
        return torch.from_numpy(values.reshape(len(values), -1)).view(dtype)  # float8 is uint8 here

    codes, scale = tensor(plain.codes, torch.uint8), tensor(plain.scale, spec.scale_dtype)
    assert codes is not None and scale is not None
    return PlainWeight(
        spec,
        codes,
        scale,
        tensor(plain.zero, spec.zero_dtype),
        tensor(plain.block_scale, torch.float16),
        tensor(plain.block_zero, torch.float16),
    )
