"""Damaged GGUF files end in a CheckpointError or open; nothing else, and never at a cost beyond the file's size."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_writer import Tensor, Typed, bpe_tokenizer, spm_tokenizer, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import CheckpointError, GGUFFile
from qkernels.checkpoints.gguf import StringArray
from qkernels.checkpoints.gguf_blocks import BY_NAME
from qkernels.tokenizer import Tokenizer

# What a few Python objects per entry of the header may cost at most, besides a fixed amount.
ALLOCATION_FACTOR, ALLOCATION_FIXED = 40, 1 << 20
EDGES = [0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def seed_file(folder: Path) -> bytes:
    metadata = {
        "general.architecture": "llama", "general.alignment": 32, "a.float": 1.5, "a.flag": True, "a.string": "text",
        "a.strings": ["one", "", "three"], "a.ints": [1, -2, 3], "a.empty": Typed(9, [], 4),
        "a.bools": Typed(9, [0, 1], 7), "a.long": Typed(10, 2**40), "a.double": Typed(12, 0.25),
    }  # fmt: skip
    tensors = [
        Tensor("norm", "F32", (6,)), Tensor("half", "F16", (3, 5)), Tensor("w0", "Q4_0", (3, 64)),
        Tensor("w1", "Q4_1", (2, 2, 32)), Tensor("w2", "Q8_0", (5, 32)), Tensor("k", "Q4_K", (1, 256)),
    ]  # fmt: skip
    return write_gguf(folder / "seed.gguf", metadata, tensors).read_bytes()


def read_everything(path: Path) -> bool:
    """Whether the file opened; reads all of it then, tolerating CheckpointError alone."""
    try:
        file = GGUFFile(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    with file:
        for key in file.metadata:
            try:
                value = file.metadata[key]
                if isinstance(value, StringArray):
                    list(value)
            except CheckpointError as error:
                assert str(path) in str(error)
        for name, info in file.tensors.items():
            block = BY_NAME[info.type]
            try:
                if block.decode is None:
                    dense = file.dense(name)
                    assert tuple(dense.shape) == info.shape
                    dense.contiguous().view(torch.uint8).sum()
                else:
                    rows = sum(len(w.codes) for _, w in file.plain_blocks(name, 2))
                    assert rows == np.prod(info.shape[:-1], dtype=np.int64)
            except CheckpointError as error:
                assert str(path) in str(error)
    return True


def mutate(raw: bytes, header: int, rng: random.Random) -> bytes:
    """One to three damages within the header: bits, bytes, whole numbers, parts removed, repeated or moved."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, at = rng.randrange(8), rng.randrange(4 if rng.random() < 0.98 else 0, header)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3):
            data[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
        elif kind == 4:
            data[at : at + 4] = struct.pack("<I", rng.choice(EDGES) & 0xFFFFFFFF)
        elif kind == 5:
            del data[at : at + rng.choice((1, 2, 4, 8, 32))]
        elif kind == 6:
            data[at:at] = data[at : at + rng.choice((1, 4, 8, 24))]
        else:
            del data[at if rng.random() < 0.5 else rng.randrange(header, len(data)) :]
        if len(data) <= header:
            break
    return bytes(data)


def test_mutated_headers(tmp_path):
    raw = seed_file(tmp_path)
    header = GGUFFile(tmp_path / "seed.gguf").tensors["norm"].offset
    path, rng = tmp_path / "x.gguf", random.Random(0)
    opened = 0
    read_everything(tmp_path / "seed.gguf")  # what is allocated once, by imports
    tracemalloc.start()  # sees Python's objects and numpy's buffers
    try:
        for i in range(2500):
            path.write_bytes(data := mutate(raw, header, rng))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            opened += read_everything(path)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < ALLOCATION_FACTOR * len(data) + ALLOCATION_FIXED, f"mutation {i}: {peak} bytes"
    finally:
        tracemalloc.stop()
    assert 100 < opened < 2400  # the mutations reach both outcomes


def test_every_field_of_the_header_at_the_edges(tmp_path):
    """Every aligned-or-not position gets the numbers that overflow."""
    raw = seed_file(tmp_path)
    header = GGUFFile(tmp_path / "seed.gguf").tensors["norm"].offset
    path = tmp_path / "x.gguf"
    for at in range(4, header - 8):
        for value in (2**64 - 1, 2**63, 2**32) if at % 3 else (0, 2**62 + 1):
            path.write_bytes(raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])
            read_everything(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "arbitrary.gguf"
    path.write_bytes(data)
    read_everything(path)
    path.write_bytes(b"GGUF\x03\0\0\0" + data)
    read_everything(path)


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    keys=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    length=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    kind=st.integers(0, 14),
    element=st.integers(0, 14),
    rest=st.binary(max_size=100),
)
def test_arbitrary_numbers_at_the_start(tmp_path_factory, tensors, keys, length, kind, element, rest):
    path = tmp_path_factory.getbasetemp() / "numbers.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(start + struct.pack("<IIQ", kind, element, length) + rest)
    read_everything(path)


@pytest.mark.parametrize("good", [bpe_tokenizer(280), spm_tokenizer()], ids=["bpe", "spm"])
def test_mutated_tokenizers(tmp_path, monkeypatch, good):
    """Whatever the metadata say, building a tokenizer of them is an error of ours or works."""
    monkeypatch.setenv("QKERNELS_CACHE", "0")
    pytest.importorskip("tokenizers", reason="tokenizers are built with the package tokenizers")
    rng = random.Random(1)
    path = tmp_path / "x.gguf"
    other = [0, -1, 2**31 - 1, True, 0.5, "", "llama", "gpt2", ["a"], ["a", "b c"], [1, 2], Typed(9, [], 8), b"\xff", [b"\xff"]]
    built = 0
    for _ in range(200):
        metadata = dict(good)
        for key in rng.sample(sorted(good), rng.choice((1, 1, 2))):
            if rng.random() < 0.3:
                del metadata[key]
            elif isinstance(metadata[key], list) and rng.random() < 0.6:
                values = list(metadata[key])
                at = rng.randrange(len(values))
                choice = rng.choice((0, 1, 2))
                if choice == 0:
                    values[at] = rng.choice(values)
                elif choice == 1:
                    del values[at]
                else:
                    values[at] = 3 if isinstance(values[at], int | float) else rng.choice(("", " ", "a b", "\U0001f600", "Ġ", "a  b"))
                metadata[key] = values
            else:
                value = rng.choice(other)
                metadata[key] = Typed(5, value) if type(value) is int else value
        write_gguf(path, metadata, [])
        try:
            tokenizer = Tokenizer.from_gguf(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            continue
        built += 1
        ids = tokenizer.encode("hello world 12 é")
        tokenizer.decode(ids)
    assert 20 < built < 190
