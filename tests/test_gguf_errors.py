"""Files that are not what they claim to be: each ends in a CheckpointError that names the thing.

`test_gguf_fuzz.py` damages files at random; these are the cases with a name.
"""

from __future__ import annotations

import mmap
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import TYPES, Tensor, Typed, header_bytes, random_blocks, write_gguf

from qkernels.checkpoints import CheckpointError, GGUFFile
from qkernels.checkpoints.gguf_blocks import QUANTIZED


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("pattern", [0x7C00, 0xFC00, 0x7E00, 0xFC01])
def test_nonfinite_scales_are_refused(tmp_path, kind, pattern):
    for offset in TYPES[kind][3]:
        elements = TYPES[kind][1]
        blocks = random_blocks(kind, 40, np.random.default_rng(3)).reshape(10, 4, -1)
        blocks[7, 2, offset : offset + 2] = np.array([pattern], "<u2").view(np.uint8)
        file = GGUFFile(
            write_gguf(
                tmp_path / "x.gguf", {}, [Tensor("w", kind, (10, 4 * elements), blocks.tobytes())]
            )
        )
        for options in ({}, {"row_order": np.arange(10)[::-1]}):
            with pytest.raises(
                CheckpointError,
                match=r"x\.gguf: tensor 'w'.*row 7, (group|block) 2: expected finite",
            ):
                list(file.plain_blocks("w", 3, **options))


def test_wrong_names_and_types_are_refused(tmp_path):
    tensors = [
        Tensor("q", "Q4_0", (2, 32)),
        Tensor("k", "NVFP4", (2, 64)),
        Tensor("f", "F32", (4,)),
    ]
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", {}, tensors))
    for call in (lambda: file.dense("nope"), lambda: file.plain_blocks("nope", 1)):
        with pytest.raises(CheckpointError, match="no tensor 'nope' among its 3"):
            call()
    with pytest.raises(
        CheckpointError, match="among F32, F16, BF16, got Q4_0; read it with plain_blocks"
    ):
        file.dense("q")
    with pytest.raises(CheckpointError, match=r"among Q4_0, .*, got NVFP4$"):
        file.plain_blocks("k", 1)
    with pytest.raises(CheckpointError, match="got F32; read it with dense"):
        file.plain_blocks("f", 1)
    file.close()
    with pytest.raises(CheckpointError, match="has been closed"):
        file.dense("f")


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf", {}, [Tensor("w", "Q8_0", (512, 512)), Tensor("f", "F32", (4,))]
    )
    file = GGUFFile(path)
    blocks = file.plain_blocks("w", 16)
    next(blocks)
    os.truncate(path, mmap.PAGESIZE)
    with pytest.raises(CheckpointError, match="shrank to"):
        list(blocks)
    with pytest.raises(CheckpointError, match="shrank to"):
        file.dense("f")


def test_invalid_utf8_is_an_error_where_it_is_read(tmp_path):
    values = {"s": Typed(8, b"\xff\xfe"), "strings": Typed(9, [b"fine", b"\xc3"], 8)}
    meta = GGUFFile(write_gguf(tmp_path / "x.gguf", values, [])).metadata
    with pytest.raises(CheckpointError, match=r"x\.gguf: metadata 's': expected UTF-8"):
        meta["s"]
    assert meta["strings"][0] == "fine" and meta["strings"].raw(1) == b"\xc3"
    with pytest.raises(CheckpointError, match="metadata 'strings': element 1: expected UTF-8"):
        list(meta["strings"])
    with pytest.raises(CheckpointError, match="key 0 of the metadata: expected UTF-8"):
        GGUFFile(
            raw_file(
                tmp_path, struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(32)
            )
        )


def raw_file(folder: Path, after_version: bytes, version: int = 3) -> Path:
    path = folder / "raw.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + after_version)
    return path


def test_files_that_are_not_gguf(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"GGUF\x03")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04" + bytes(100))
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing": "No such file",
        "empty": "at least 24 bytes, got 0",
        "short": "got 5 bytes",
        "zip": "not a GGUF file",
        ".": "got a directory",
        "pipe": "not a regular file",
        "a\0b": "null",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            GGUFFile(os.path.join(tmp_path, name))


@pytest.mark.parametrize(
    "version,message",
    [
        (0, "got 0"),
        (1, "obsolete"),
        (4, "got 4"),
        (0x03000000, "big-endian"),
        (2**32 - 1, "got 4294967295"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path, version, message):
    with pytest.raises(CheckpointError, match=rf"version: expected 2 or 3.*{message}"):
        GGUFFile(raw_file(tmp_path, bytes(64), version))


U64 = struct.Struct("<Q").pack
HUGE = [2**20, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
def test_absurd_counts_and_lengths(tmp_path, count):
    one_key = U64(0) + U64(1) + U64(1) + b"k"
    cases = {
        "number of tensors": U64(count) + U64(0),
        "number of metadata keys": U64(0) + U64(count),
        "key 0 of the metadata": U64(0) + U64(1) + U64(count),
        "metadata 'k'": one_key + struct.pack("<I", 8) + U64(count),
        "metadata 'k': length": one_key + struct.pack("<II", 9, 8) + U64(count),
        "metadata 'k': element 1": one_key
        + struct.pack("<II", 9, 8)
        + U64(2)
        + U64(1)
        + b"x"
        + U64(count),
    }
    for thing, body in cases.items():
        with pytest.raises(CheckpointError, match=thing):
            GGUFFile(raw_file(tmp_path, body + bytes(200)))
    for kind in (0, 4, 7, 10, 12):
        with pytest.raises(CheckpointError, match="metadata 'k': length: expected at most"):
            GGUFFile(
                raw_file(tmp_path, one_key + struct.pack("<II", 9, kind) + U64(count) + bytes(200))
            )


def test_more_entries_than_any_model_has(tmp_path):
    body = (
        U64(0)
        + U64(70_000)
        + b"".join(
            U64(3) + struct.pack(">I", i)[1:] + struct.pack("<IB", 0, 0) for i in range(70_000)
        )
    )
    with pytest.raises(
        CheckpointError, match="number of metadata keys: expected at most 65536, got 70000"
    ):
        GGUFFile(raw_file(tmp_path, body))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"shape": (0, 32)}, "dimensions of at least 1"),
        ({"shape": (2**62, 2**5)}, r"fewer than 2\^63"),
        ({"shape": (2**40, 32)}, "truncated or corrupt"),
        ({"shape": (4, 33)}, "a multiple of 32 columns"),
        ({"type": "Q4_K", "shape": (4, 128)}, "a multiple of 256 columns"),
        ({"shape": ()}, "1 to 4 dimensions, got 0"),
        ({"shape": (1, 1, 1, 1, 32)}, "1 to 4 dimensions, got 5"),
        ({"number": 4}, "type number 4"),
        ({"number": 2**31}, "type number 2147483648"),
        ({"offset": 1}, "a multiple of 32, got 1"),
        ({"offset": 2**63}, "truncated or corrupt"),
        ({"offset": 2**64 - 32}, "truncated or corrupt"),
        ({"offset": 0}, "where 'first' ends, got"),
        ({"name": "first"}, "every name once"),
        ({"name": "x" * 500}, "1 to 4 dimensions"),
    ],
)
def test_bad_tensors(tmp_path, change, message):
    second = Tensor("second", "Q4_0", (4, 32))
    for key, value in change.items():
        setattr(second, key, value)
    if len(second.name) > 100:
        second.shape = ()
    header, _ = header_bytes({}, [Tensor("first", "F32", (8,)), second])
    (tmp_path / "x.gguf").write_bytes(header + bytes(400))
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(tmp_path / "x.gguf")
    assert "x.gguf" in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"general.alignment": 0}, "power of two"),
        ({"general.alignment": 48}, "power of two"),
        ({"general.alignment": 4}, "power of two"),
        ({"general.alignment": Typed(5, -8)}, "power of two"),
        ({"general.alignment": "32"}, "power of two"),
        ({"general.alignment": Typed(7, True)}, "power of two"),
        ({"general.alignment": Typed(9, [32], 4)}, "power of two"),
        ({"general.alignment": Typed(10, 2**63)}, "truncated or corrupt"),
        ({"split.count": Typed(2, 3)}, "one of 3 parts"),
        (
            {"split.count": [1, 2], "general.alignment": 0},
            "power of two",
        ),  # an array counts as none
        ({"k": Typed(9, [[1]], 9)}, "array of arrays"),
        ({"flag": Typed(7, 2)}, "a bool of 0 or 1, got 2"),
        ({"flags": Typed(9, [0, 9], 7)}, "bools of 0 or 1, got 9"),
    ],
)
def test_bad_metadata(tmp_path, values, message):
    path = write_gguf(tmp_path / "x.gguf", values, [Tensor("w", "F32", (8,))])
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_duplicate_and_mistyped_keys(tmp_path):
    key = U64(1) + b"k" + struct.pack("<IB", 0, 1)
    with pytest.raises(CheckpointError, match="metadata 'k': expected every key once"):
        GGUFFile(raw_file(tmp_path, U64(0) + U64(2) + key + key))
    for kind in (13, 2**32 - 1):
        with pytest.raises(CheckpointError, match=f"0 to 12, got {kind}"):
            GGUFFile(
                raw_file(
                    tmp_path, U64(0) + U64(1) + U64(1) + b"k" + struct.pack("<I", kind) + bytes(40)
                )
            )
        with pytest.raises(CheckpointError, match=f"0 to 12, got {kind}"):
            GGUFFile(
                raw_file(
                    tmp_path,
                    U64(0) + U64(1) + U64(1) + b"k" + struct.pack("<II", 9, kind) + bytes(40),
                )
            )


def test_every_truncation_is_an_error(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        {"s": "text", "list": ["a", "bc"], "n": 1},
        [Tensor("w", "Q4_0", (2, 32))],
    )
    raw = path.read_bytes()
    end = GGUFFile(path).tensors["w"]
    for size in range(end.offset + end.nbytes):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            GGUFFile(path)


def test_opening_leaks_nothing(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", "F32", (8,))])
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes()[:-40])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        for _ in range(600):
            with GGUFFile(path):
                pass
            with pytest.raises(CheckpointError):
                GGUFFile(bad)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
