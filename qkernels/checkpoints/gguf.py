"""GGUF files, v2 and v3, little-endian: metadata and tensors of a memory-mapped file.

Every count, length and offset is checked against the bytes that are left before it is used, so a damaged or hostile
file ends in a `CheckpointError`, and opening one allocates at most a small multiple of what it holds. Nothing is
decoded before it is asked for. Format: docs/gguf.md of github.com/ggml-org/ggml.
"""

from __future__ import annotations

import itertools
import mmap
import os
import stat
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import numpy as np
import torch

from qkernels.checkpoints.errors import CheckpointError
from qkernels.checkpoints.gguf_blocks import (
    BY_NAME,
    DENSE,
    QUANTIZED,
    TYPES,
    BlockType,
    nonfinite_group,
)
from qkernels.quant.weight import PlainWeight

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Real files have about 50 keys and 300 to 3,000 tensors. The limits bound the Python objects that a crafted file of
# many tiny entries could demand per byte.
MAX_ENTRIES = 65_536
MAX_DIMS = 4

STRING, ARRAY = 8, 9
# value type -> name, struct format; bool (7) is apart: its byte must be 0 or 1
SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"), 10: ("uint64", "<Q"), 11: ("int64", "<q"),
    12: ("float64", "<d"),
}  # fmt: skip
MIN_KEY_BYTES = 8 + 4 + 1  # an empty key, a type, a one-byte value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension

COPY_BELOW = (
    1 << 16
)  # dense tensors smaller than this are copied: a mapping of their own would cost more


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file; nothing of it has been read."""

    name: str
    type: str  # ggml's name: "F32", "Q4_1", ...
    shape: tuple[int, ...]  # torch order: rows first, the contiguous dimension last
    offset: int  # bytes from the start of the file
    nbytes: int


class StringArray(Sequence[str]):
    """An array of strings that stays bytes of the mapped file until elements are asked for."""

    def __init__(self, data: mmap.mmap, starts: array[int], stop: int, where: str) -> None:
        self._data = data
        self._stop = stop  # of the last element
        self._starts = starts  # of the characters; the length is the uint64 in front
        self._where = where

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, index: int) -> bytes:
        """The bytes of one element, whether or not they are UTF-8."""
        start = self._starts[index]
        (length,) = struct.unpack_from("<Q", self._data, start - 8)
        return self._data[start : start + length]

    def _decode(self, index: int) -> str:
        try:
            return self.raw(index).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._where}: element {index}: expected UTF-8, got {_short(self.raw(index))} ({error.reason})"
            ) from None

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._where}: index {index} of {len(self)} elements")
        return self._decode(index % len(self))

    def stored(self) -> bytes:
        """All elements as they are in the file, each behind its length."""
        return self._data[self._starts[0] - 8 : self._stop] if self._starts else b""

    def __iter__(self) -> Iterator[str]:
        if not self._starts:
            return
        stored, first = self.stored(), self._starts[0] - 8
        # Every element ends 8 bytes, a length, before the next one starts.
        stops = itertools.chain((start - 8 for start in self._starts[1:]), (self._stop,))
        for index, (start, stop) in enumerate(zip(self._starts, stops)):  # noqa: B905
            try:
                yield stored[start - first : stop - first].decode()
            except UnicodeDecodeError:
                yield self._decode(index)  # raises, naming the element

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings of {self._where})"


class Metadata(Mapping[str, Any]):
    """The file's key/value pairs. Scalars are int, float or bool; strings str; arrays of numbers read-only
    one-dimensional numpy arrays; arrays of strings `StringArray`. Decoded on access."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{self._where}: metadata {key!r}: expected UTF-8, got {_short(value)} ({error.reason})"
                ) from None
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"Metadata({len(self)} keys of {self._where})"


def _short(value: str | bytes) -> str:
    """What came, for a message, at a bounded length."""
    text = repr(value[:60])
    return text if len(value) <= 60 else f"{text}... ({len(value)} long)"


class _Header:
    """A bounds-checked cursor over the mapped file. `thing` in its messages is what is being read."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def fail(self, thing: str, expected: str, given: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {thing}: expected {expected}, got {given}")

    def take(self, nbytes: int, thing: str) -> int:
        """Moves past nbytes and returns where they start."""
        start = self.position
        if nbytes > self.size - start:
            raise self.fail(
                thing,
                f"{nbytes} bytes at offset {start}",
                f"{self.size - start} up to the end of the file (truncated or corrupt)",
            )
        self.position = start + nbytes
        return start

    def number(self, code: str, thing: str) -> int:
        (value,) = struct.unpack_from(code, self.data, self.take(struct.calcsize(code), thing))
        return value

    def count(self, thing: str, minimum: int, limit: int | None = None) -> int:
        """A uint64 count of entries that take at least `minimum` bytes each."""
        value = self.number("<Q", thing)
        possible = (self.size - self.position) // minimum
        if value > possible:
            raise self.fail(
                thing, f"at most {possible}, all that fits into the rest of the file", str(value)
            )
        if limit is not None and value > limit:
            raise self.fail(thing, f"at most {limit}", str(value))
        return value

    def string_bytes(self, thing: str) -> bytes:
        length = self.number("<Q", thing)
        start = self.take(length, thing)
        return self.data[start : start + length]

    def name(self, thing: str) -> str:
        raw = self.string_bytes(thing)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(thing, "UTF-8", f"{_short(raw)} ({error.reason})") from None

    def value(self, key: str) -> Any:
        thing = f"metadata {_short(key)}"
        kind = self.number("<I", thing)
        if kind == STRING:
            return self.string_bytes(thing)
        if kind == ARRAY:
            return self.array(thing)
        if kind not in SCALARS:
            raise self.fail(thing, "a value type of 0 to 12", str(kind))
        name, code = SCALARS[kind]
        number = self.number(code, thing)
        if name == "bool":
            if number > 1:
                raise self.fail(thing, "a bool of 0 or 1", str(number))
            return bool(number)
        return number

    def array(self, thing: str) -> np.ndarray | StringArray:
        kind = self.number("<I", thing)
        if kind == ARRAY:
            raise self.fail(
                thing,
                "an array of numbers or strings",
                "an array of arrays, which is not supported",
            )
        if kind == STRING:
            return self.string_array(thing)
        if kind not in SCALARS:
            raise self.fail(thing, "elements of type 0 to 12", str(kind))
        name, code = SCALARS[kind]
        dtype = np.dtype(code)
        count = self.count(f"{thing}: length", dtype.itemsize)
        start = self.take(count * dtype.itemsize, thing)
        # Copied, since the file aligns nothing here.
        values = np.frombuffer(self.data, dtype, count, start).copy()
        if name == "bool":
            if values.size and values.max() > 1:
                raise self.fail(thing, "bools of 0 or 1", str(int(values.max())))
            values = values.view(np.bool_)
        values.setflags(write=False)
        return values

    def string_array(self, thing: str) -> StringArray:
        count = self.count(f"{thing}: length", 8)
        starts = array("Q", bytes(8 * count))
        data, size, position = self.data, self.size, self.position
        unpack = struct.Struct("<Q").unpack_from
        for i in range(
            count
        ):  # a chain of lengths: 0.1 us per element, so 30 ms for 300,000 tokens
            if position > size - 8:
                self.position = position
                self.take(8, f"{thing}: element {i}")
            (length,) = unpack(data, position)
            position += 8
            starts[i] = position
            if length > size - position:
                self.position = position
                self.take(length, f"{thing}: element {i}")
            position += length
        self.position = position
        return StringArray(data, starts, position, f"{self.path}: {thing}")


def llama_row_order(heads: int, head_dim: int) -> np.ndarray:
    """[heads * head_dim] int64: the file row of each row of an `attn_q` or `attn_k` weight.

    Files of the llama architecture store those rows so that the two halves of a rotary pair are neighbours; row
    h * head_dim + half * head_dim/2 + i (rotate-half order) is in the file at h * head_dim + 2 i + half.
    """
    if heads < 1 or head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"llama_row_order: expected heads >= 1 and an even head_dim, got {heads} and {head_dim}"
        )
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


class GGUFFile:
    """A memory-mapped GGUF file.

    path: a regular file. Raises `CheckpointError` for anything that is not a well-formed little-endian GGUF file of
    version 2 or 3. Usable as a context manager. As with any mapping, the process dies (SIGBUS) if another one truncates the file while it is being read; each access checks the
    file's size first, which narrows that to the access itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if sys.byteorder != "little":
            raise CheckpointError(
                f"{self.path}: GGUF files are read on little-endian machines only"
            )
        self._file, self._map = self._open()
        try:
            self._parse()
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
                    f"{self.path}: expected a GGUF file of at least 24 bytes, got {size} bytes starting with {start!r}"
                )
            return file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except BaseException:
            file.close()
            raise

    def _parse(self) -> None:
        header = _Header(self.path, self._map)
        magic = self._map[:4]
        if magic != MAGIC:
            raise header.fail("magic", repr(MAGIC), f"{magic!r}, so this is not a GGUF file")
        header.position = 4
        self.version = header.number("<I", "version")
        if self.version not in VERSIONS:
            given = str(self.version)
            if self.version == 1:
                given = "1, an obsolete layout: convert it again with a recent llama.cpp"
            elif self.version & 0xFFFF == 0 and self.version:
                given = (
                    f"{self.version:#010x}, a big-endian file: convert it with gguf-convert-endian"
                )
            raise header.fail("version", "2 or 3, little-endian", given)
        n_tensors = header.count("number of tensors", MIN_TENSOR_BYTES, MAX_ENTRIES)
        n_keys = header.count("number of metadata keys", MIN_KEY_BYTES, MAX_ENTRIES)

        self.metadata = Metadata(self.path)
        values = self.metadata._values
        for i in range(n_keys):
            key = header.name(f"key {i} of the metadata")
            if key in values:
                raise header.fail(f"metadata {_short(key)}", "every key once", "a second one")
            values[key] = header.value(key)

        parts = values.get("split.count", 1)
        if parts != 1:
            raise header.fail(
                "metadata 'split.count'",
                "a whole model",
                f"one of {parts} parts: join them with llama-gguf-split --merge",
            )
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise header.fail(
                "metadata 'general.alignment'",
                "a power of two of at least 8",
                _short(str(alignment)),
            )

        listed = self._tensor_list(header, n_tensors, alignment)
        data_start = -(-header.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, block, shape, offset in listed:
            nbytes = prod(shape) // block.elements * block.nbytes
            start = data_start + offset
            if start + nbytes > header.size:
                raise header.fail(
                    f"tensor {_short(name)} ({block.name}, shape {shape})",
                    f"{nbytes} bytes at offset {start}",
                    f"a file of {header.size} bytes (truncated or corrupt)",
                )
            self.tensors[name] = TensorInfo(name, block.name, shape, start, nbytes)
        in_order = sorted(self.tensors.values(), key=lambda t: t.offset)
        for before, after in itertools.pairwise(in_order):
            if before.offset + before.nbytes > after.offset:
                raise header.fail(
                    f"tensor {_short(after.name)}",
                    f"an offset of at least {before.offset + before.nbytes}, where {_short(before.name)} ends",
                    str(after.offset),
                )

    def _tensor_list(
        self, header: _Header, count: int, alignment: int
    ) -> list[tuple[str, BlockType, tuple[int, ...], int]]:
        listed = []
        seen = set()
        for i in range(count):
            name = header.name(f"name of tensor {i}")
            thing = f"tensor {_short(name)}"
            if name in seen:
                raise header.fail(thing, "every name once", "a second one")
            seen.add(name)
            n_dims = header.number("<I", thing)
            if not 1 <= n_dims <= MAX_DIMS:
                raise header.fail(thing, f"1 to {MAX_DIMS} dimensions", str(n_dims))
            dims = [header.number("<Q", thing) for _ in range(n_dims)]
            kind = header.number("<I", thing)
            offset = header.number("<Q", thing)
            if kind not in TYPES:
                raise header.fail(
                    thing, f"a type among {', '.join(BY_NAME)}", f"type number {kind}"
                )
            block = TYPES[kind]
            if min(dims) < 1 or prod(dims) >= 1 << 63:
                raise header.fail(
                    thing, "dimensions of at least 1, fewer than 2^63 elements", f"{dims}"
                )
            if dims[0] % block.elements:
                raise header.fail(
                    thing,
                    f"rows of a multiple of {block.elements} columns ({block.name})",
                    str(dims[0]),
                )
            if offset % alignment:
                raise header.fail(
                    thing, f"an offset that is a multiple of {alignment}", str(offset)
                )
            listed.append((name, block, tuple(reversed(dims)), offset))
        return listed

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file: no tensor can be taken from it afterwards. What was taken, and the metadata, stay valid; the
        mapping goes with the last of them."""
        self._file.close()

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, version {self.version}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: no tensor {_short(name)} among its {len(self.tensors)}"
            )
        if self._file.closed:
            raise CheckpointError(f"{self.path}: tensor {_short(name)}: the file has been closed")
        info = self.tensors[name]
        size = os.fstat(self._file.fileno()).st_size
        if info.offset + info.nbytes > size:  # reading on would be a SIGBUS
            raise CheckpointError(
                f"{self.path}: tensor {_short(name)}: the file shrank to {size} bytes since it was opened"
            )
        return info

    def dense(self, name: str) -> torch.Tensor:
        """The float tensor `name`, in the file's dtype (float32, float16 or bfloat16) and its `shape`.

        No copy from 64 KiB on: the storage is a private mapping of the file, whose pages are read when touched and
        shared with the page cache. Writing to the tensor changes this tensor only, never the file or a second
        `dense(name)`. Raises `CheckpointError` for an unknown name and for other types.
        """
        info = self._info(name)
        dtype = BY_NAME[info.type].dtype
        if dtype is None:
            hint = "; read it with plain_blocks" if info.type in QUANTIZED else ""
            raise CheckpointError(
                f"{self.path}: tensor {_short(name)}: expected a type among {', '.join(DENSE)}, got {info.type}{hint}"
            )
        buffer: bytearray | mmap.mmap
        if info.nbytes < COPY_BELOW:
            buffer, skip = bytearray(self._map[info.offset : info.offset + info.nbytes]), 0
        else:
            # A mapping of its own, since the large one is read-only and torch would crash when writing to it.
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
        self, name: str, rows: int, row_order: np.ndarray | torch.Tensor | None = None
    ) -> Iterator[tuple[int, PlainWeight]]:
        """The quantized tensor `name`, exactly, as (start row, `PlainWeight` of up to `rows` rows), in order.

        rows: rows per block, at least 1. row_order: integers [R]; row i of the result is row row_order[i] of the file
        (default: all rows as they are); indices may repeat. Tensors of more than two dimensions (experts) count as
        their rows one after the other. A block needs its own size plus a few percent while it is decoded (with
        row_order plus the size of its rows in the file); the file's pages are given back to the system after it.

        Raises `CheckpointError` for an unknown name, types that cannot be read, scales that are not finite;
        `ValueError` for bad rows or row_order; all but the scales before the first block.
        """
        info = self._info(name)
        block = BY_NAME[info.type]
        if block.decode is None or block.spec is None:
            hint = "; read it with dense" if info.type in DENSE else ""
            raise CheckpointError(
                f"{self.path}: tensor {_short(name)}: expected a type among {', '.join(QUANTIZED)}, got {info.type}{hint}"
            )
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"plain_blocks({name!r}): expected rows >= 1, got {rows!r}")
        order = None
        n = prod(info.shape[:-1])
        if row_order is not None:
            order = np.asarray(row_order)
            if order.ndim != 1 or order.dtype.kind not in "iu":
                raise ValueError(
                    f"plain_blocks({name!r}): expected a one-dimensional integer row_order, got {order.dtype} {order.shape}"
                )
            if order.size and not (order.min() >= 0 and order.max() < n):
                raise ValueError(
                    f"plain_blocks({name!r}): expected row_order in [0, {n}), got {order.min()} to {order.max()}"
                )
        return self._decode_blocks(info, block, rows, order)

    def _decode_blocks(
        self, info: TensorInfo, block: BlockType, rows: int, order: np.ndarray | None
    ) -> Iterator[tuple[int, PlainWeight]]:
        assert block.spec is not None and block.decode is not None
        groups = info.shape[-1] // block.elements
        n = prod(info.shape[:-1])
        total = n if order is None else order.size
        for start in range(0, total, rows):
            stop = min(start + rows, total)
            self._info(info.name)  # still there?
            stored = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset).reshape(
                n, groups, block.nbytes
            )
            raw = stored[start:stop] if order is None else stored[order[start:stop]]
            if (bad := nonfinite_group(block, raw)) is not None:
                row = start + bad[0] if order is None else int(order[start + bad[0]])
                raise CheckpointError(
                    f"{self.path}: tensor {_short(info.name)} ({info.type}): row {row}, group {bad[1]}: "
                    "expected finite scales, got infinity or NaN"
                )
            codes = np.empty((stop - start, groups, block.elements), np.uint8)
            scale, zero = block.decode(raw, codes)
            touched = (
                (start, stop)
                if order is None
                else (int(order[start:stop].min()), int(order[start:stop].max()) + 1)
            )
            del raw, stored
            row_bytes = groups * block.nbytes
            self._forget(info.offset + touched[0] * row_bytes, info.offset + touched[1] * row_bytes)
            weight = PlainWeight(
                spec=block.spec,
                codes=torch.from_numpy(codes.reshape(stop - start, -1)),
                scale=torch.from_numpy(scale),
                zero=None if zero is None else torch.from_numpy(zero),
            )
            del codes, scale, zero
            yield start, weight
            del weight

    def _forget(self, start: int, stop: int) -> None:
        """Unmaps whole pages within [start, stop), so that a model read once does not stay resident twice. They remain
        in the page cache; reading them again is a soft fault."""
        if hasattr(self._map, "madvise"):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
