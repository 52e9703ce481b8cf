"""Damaged GGUF files end in a CheckpointError or open; nothing else, and never at a cost beyond the
file's size."""

from __future__ import annotations

import random
import struct

import pytest
from fuzz import EDGES, Gguf, read_gguf, run_fuzz
from gguf_writer import Typed, bpe_tokenizer, spm_tokenizer, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import CheckpointError
from qkernels.tokenizer import Tokenizer


def test_ten_thousand_damaged_headers(tmp_path):
    """Of a file with every type; whatever still opens is read and packed."""
    assert 300 < run_fuzz("gguf", 10_000, tmp_path) < 9_000  # the damages reach both outcomes


def test_damaged_blocks(tmp_path):
    """What is read has the values that the gguf package gives."""
    pytest.importorskip("gguf", reason="the gguf package is the oracle of this test")
    assert 600 < run_fuzz("gguf-data", 1_000, tmp_path) < 1_000


@pytest.mark.parametrize("model", ["gguf-model", "gguf-gemma"])
def test_damaged_headers_of_a_model(tmp_path, model):
    assert 30 < run_fuzz(model, 600, tmp_path) < 560


def test_every_field_of_the_header_at_the_edges(tmp_path):
    """Every aligned-or-not position gets the numbers that overflow."""
    seed = Gguf(tmp_path)
    seed.whole()
    raw = seed.raw
    for at in range(4, seed.header - 8):
        for value in (2**64 - 1, 2**63, 2**32) if at % 3 else (0, 2**62 + 1):
            seed.path.write_bytes(raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])
            read_gguf(seed.path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "arbitrary.gguf"
    path.write_bytes(data)
    read_gguf(path)
    path.write_bytes(b"GGUF\x03\0\0\0" + data)
    read_gguf(path)


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    keys=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    length=st.integers(0, 2**64 - 1) | st.sampled_from(EDGES),
    kind=st.integers(0, 14),
    element=st.integers(0, 14),
    rest=st.binary(max_size=100),
)
def test_arbitrary_numbers_at_the_start(
    tmp_path_factory, tensors, keys, length, kind, element, rest
):
    path = tmp_path_factory.getbasetemp() / "numbers.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(start + struct.pack("<IIQ", kind, element, length) + rest)
    read_gguf(path)


@pytest.mark.parametrize("good", [bpe_tokenizer(280), spm_tokenizer()], ids=["bpe", "spm"])
def test_mutated_tokenizers(tmp_path, monkeypatch, good):
    """Whatever the metadata say, building a tokenizer of them is an error of ours or works."""
    monkeypatch.setenv("QKERNELS_CACHE", "0")
    pytest.importorskip("tokenizers", reason="tokenizers are built with the package tokenizers")
    rng = random.Random(1)
    path = tmp_path / "x.gguf"
    other = [
        0,
        -1,
        2**31 - 1,
        True,
        0.5,
        "",
        "llama",
        "gpt2",
        ["a"],
        ["a", "b c"],
        [1, 2],
        Typed(9, [], 8),
        b"\xff",
        [b"\xff"],
    ]
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
                    values[at] = (
                        3
                        if isinstance(values[at], int | float)
                        else rng.choice(("", " ", "a b", "\U0001f600", "Ġ", "a  b"))
                    )
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
