"""The header of a GGUF file: metadata and the list of tensors.

Every count, length and offset is checked against the bytes that are left before it is used, so a
damaged or hostile file ends in a `CheckpointError`, and reading one allocates at most a small
multiple of what it holds. Format: docs/gguf.md of github.com/ggml-org/ggml.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import numpy as np

from .errors import CheckpointError
from .gguf_blocks import BY_NAME, TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Real files have about 50 keys and 300 to 3,000 tensors. The limits bound the Python objects that a
# crafted file of many tiny entries could demand per byte.
MAX_ENTRIES = 65_536
MAX_DIMS = 4

STRING, ARRAY = 8, 9
# value type -> name, struct format; bool (7) is apart: its byte must be 0 or 1
SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"),
    4: ("uint32", "<I"), 5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"),
    10: ("uint64", "<Q"), 11: ("int64", "<q"), 12: ("float64", "<d"),
}  # fmt: skip
MIN_KEY_BYTES = 8 + 4 + 1  # an empty key, a type, a one-byte value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension


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
                f"{self._where}: element {index}: expected UTF-8, got {shorten(self.raw(index))} "
                f"({error.reason})"
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
    """The file's key/value pairs. Scalars are int, float or bool; strings str; arrays of numbers
    read-only one-dimensional numpy arrays; arrays of strings `StringArray`. Decoded on access."""

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
                    f"{self._where}: metadata {key!r}: expected UTF-8, got {shorten(value)} "
                    f"({error.reason})"
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


def shorten(value: str | bytes) -> str:
    """What came, for a message, at a bounded length."""
    text = repr(value[:60])
    return text if len(value) <= 60 else f"{text}... ({len(value)} long)"


class _Cursor:
    """A bounds-checked cursor over the mapped file. `thing` in its messages is what is being
    read."""

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
            raise self.fail(thing, "UTF-8", f"{shorten(raw)} ({error.reason})") from None

    def value(self, key: str) -> Any:
        thing = f"metadata {shorten(key)}"
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


def read_header(path: str, data: mmap.mmap) -> tuple[int, Metadata, dict[str, TensorInfo]]:
    """(version, metadata, tensors by name) of a mapped file. Raises `CheckpointError`."""
    header = _Cursor(path, data)
    magic = data[:4]
    if magic != MAGIC:
        raise header.fail("magic", repr(MAGIC), f"{magic!r}, so this is not a GGUF file")
    header.position = 4
    version = header.number("<I", "version")
    if version not in VERSIONS:
        given = str(version)
        if version == 1:
            given = "1, an obsolete layout: convert it again with a recent llama.cpp"
        elif int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            given = f"{version:#010x}, a big-endian file: convert it with gguf-convert-endian"
        raise header.fail("version", "2 or 3, little-endian", given)
    n_tensors = header.count("number of tensors", MIN_TENSOR_BYTES, MAX_ENTRIES)
    n_keys = header.count("number of metadata keys", MIN_KEY_BYTES, MAX_ENTRIES)

    metadata = Metadata(path)
    values = metadata._values
    for i in range(n_keys):
        key = header.name(f"key {i} of the metadata")
        if key in values:
            raise header.fail(f"metadata {shorten(key)}", "every key once", "a second one")
        values[key] = header.value(key)

    parts = values.get("split.count")
    if type(parts) is int and parts > 1:
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
            shorten(str(alignment)),
        )

    listed = _tensor_list(header, n_tensors, alignment)
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, block, shape, offset in listed:
        nbytes = prod(shape) // block.elements * block.nbytes
        start = data_start + offset
        if start + nbytes > header.size:
            raise header.fail(
                f"tensor {shorten(name)} ({block.name}, shape {shape})",
                f"{nbytes} bytes at offset {start}",
                f"a file of {header.size} bytes (truncated or corrupt)",
            )
        tensors[name] = TensorInfo(name, block.name, shape, start, nbytes)
    in_order = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise header.fail(
                f"tensor {shorten(after.name)}",
                f"an offset of at least {before.offset + before.nbytes}, "
                f"where {shorten(before.name)} ends",
                str(after.offset),
            )
    return version, metadata, tensors


def _tensor_list(
    header: _Cursor, count: int, alignment: int
) -> list[tuple[str, BlockType, tuple[int, ...], int]]:
    listed = []
    seen = set()
    for i in range(count):
        name = header.name(f"name of tensor {i}")
        thing = f"tensor {shorten(name)}"
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
            raise header.fail(thing, f"a type among {', '.join(BY_NAME)}", f"type number {kind}")
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
            raise header.fail(thing, f"an offset that is a multiple of {alignment}", str(offset))
        listed.append((name, block, tuple(reversed(dims)), offset))
    return listed
