"""Every block type of GGUF, from the file to the packed weight: exact on each instruction set, and
no larger than on disk.

Files are encoded by `libgguf`, which holds llama.cpp's own quantizers; the `gguf` package, which
decodes in numpy, says what they mean.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import random_x
from gguf_writer import TYPES, Tensor, random_blocks, write_gguf
from numerics import assert_within, linear_exact

from qkernels.checkpoints import CheckpointError, GGUFFile
from qkernels.checkpoints.gguf_blocks import BY_NAME, QUANTIZED
from qkernels.loading import pack_blocks, rotary_row_order, rows_per_block
from qkernels.quant import E2M1, PackedWeight

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of these tests")


def oracle(raw: np.ndarray, kind: str) -> torch.Tensor:
    """[N, bytes of a row] uint8 -> [N, K] float32."""
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.int32), want.contiguous().view(torch.int32))


def stored(file: GGUFFile, name: str) -> np.ndarray:
    """The bytes of a tensor, [N, bytes of a row]."""
    info = file.tensors[name]
    raw = np.memmap(file.path, np.uint8, "r", info.offset, (info.nbytes,))
    return raw.reshape(int(np.prod(info.shape[:-1])), -1)


def packed(file: GGUFFile, name: str, order: np.ndarray | None = None) -> PackedWeight:
    """As loading does it, with blocks of rows that reuse one buffer."""
    n, k = file.tensors[name].shape
    rows = rows_per_block(k)
    room = np.empty(rows * k, np.uint8)
    spec = BY_NAME[file.tensors[name].type].spec
    return pack_blocks(spec, n, k, file.plain_blocks(name, rows, order, room))


def weights_of(path: Path, name: str) -> np.ndarray:
    """float32 weights of a real model."""
    with GGUFFile(path) as file:
        return torch.cat([w.dequantize() for _, w in file.plain_blocks(name, 4096)]).numpy()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_random_blocks_are_exact_on_every_instruction_set(tmp_path, isa, kind):
    """Any bits but scales that are not finite, through pack, dequantize and unpack."""
    elements, size, halves = TYPES[kind][1:]
    n, k = 77, elements * (3 if elements == 256 else 7)
    rng = np.random.default_rng(11)
    blocks = rng.integers(0, 256, (n * k // elements, size), dtype=np.uint8)
    for offset in halves:
        high = blocks[:, offset + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # infinity and NaN
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(1, 253, len(blocks))
    raw = blocks.reshape(n, -1)
    want = oracle(raw, kind)
    path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, (n, k), raw.tobytes())])
    weight = packed(GGUFFile(path), "w")
    assert same_bits(isa.ops.dequantize(*weight.op_args(), torch.float32), want)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(isa.ops.dequantize(*weight.op_args(), dtype), want.to(dtype))
    assert torch.equal(isa.ops.unpack(*weight.op_args()), weight.unpack().codes)
    assert same_bits(weight.unpack().dequantize(), want)
    assert same_bits(
        torch.ops.qkernels_reference.dequantize(*weight.op_args(), torch.float32), want
    )


@pytest.mark.parametrize("kind", QUANTIZED)
def test_linear_takes_every_type(tmp_path, isa, kind, generator):
    """With the extremes that encoders rarely give: int8 sub-scales of -128, zeros, subnormals."""
    n, k = 66, 512
    blocks = random_blocks(kind, n * k // TYPES[kind][1], np.random.default_rng(12))
    blocks[::5, 2:] = np.resize(np.array([0x80, 0x7F, 0xFF, 0x00], np.uint8), blocks.shape[1] - 2)
    for offset in TYPES[kind][3]:
        blocks[::5, offset : offset + 2] = (0x01, 0x84)  # about -6e-5
    tensors = [Tensor("w", kind, (n, k), blocks.tobytes())]
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", {}, tensors))
    weight = packed(file, "w")
    for m in (1, 3, 17):
        x = random_x(m, k, torch.float32, generator)
        y = isa.ops.linear(x, *weight.op_args(), None, "float", 0)
        assert_within(y, *linear_exact(x, weight.unpack(), None, torch.float32))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.17.ffn_down.weight"])
def test_real_weights_encoded_by_llama_cpp(tmp_path, model_path, kind, name):
    """Exact; and near the weights that were encoded, as near as so many bits can be."""
    libgguf = pytest.importorskip("libgguf", reason="the package libgguf encodes these types")
    weights = weights_of(model_path, name)
    number = gguf.GGMLQuantizationType[kind].value
    if libgguf.row_size(number, 256) == 0:  # llama.cpp has quantizers that libgguf leaves out
        raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    else:
        raw = libgguf.quantize_rows(weights, number)
    path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, weights.shape, raw.tobytes())])
    got = packed(GGUFFile(path), "w").dequantize()
    assert same_bits(got, oracle(raw, kind))
    error = np.linalg.norm(got.numpy() - weights) / np.linalg.norm(weights)
    if kind == "MXFP4":
        # One bit of mantissa: rounding errs by a quarter at most, times 1 / sqrt(3) on average.
        assert error < 0.25 / 3**0.5
    else:
        # A group's weights lie within 2.5 standard deviations or so. Codes of b bits cut that into
        # steps of 5 / 2^b of them, and the error of rounding is a step / sqrt(12).
        assert error < 1.6 * 2.0 ** -BY_NAME[kind].spec.bits


def check_file(path: Path) -> Counter[str]:
    """Every quantized tensor of a file is exact and no larger than it may be; how many there are of
    each type."""
    counts: Counter[str] = Counter()
    with GGUFFile(path) as file:
        for name, info in file.tensors.items():
            counts[info.type] += 1
            if info.type not in QUANTIZED:
                continue
            weight = packed(file, name)
            assert weight.nbytes <= allowed(info.type) * info.nbytes, name
            raw = stored(file, name)
            step = max(64, (8 << 20) // weight.k // 64 * 64)
            for start in range(0, weight.n, step):
                rows = slice(start, min(start + step, weight.n))
                part = weight.slice_rows(rows.start, rows.stop)
                assert same_bits(part.dequantize(), oracle(raw[rows], info.type)), name
    return counts


def test_every_tensor_of_smollm2(model_path):
    assert check_file(model_path)["Q4_1"] > 100


def test_every_tensor_of_gemma(gemma_path):
    counts = check_file(gemma_path)
    assert set(counts) == {"F32", "Q8_0", "Q4_K", "Q5_0", "Q6_K"}, counts


def allowed(kind: str) -> float:
    """Packed bytes per byte on disk."""
    spec = BY_NAME[kind].spec
    assert spec is not None
    return 1.10 if spec.bits < 4 else 1.03


# Matrices of Gemma 3, SmolLM2, Qwen 2.5 and 3, Llama 3; vocabularies that are no multiple of 64.
REAL_SHAPES = [
    *((262144, 640), (2048, 640), (640, 2048), (256, 640), (262144, 1152), (6912, 1152)),
    *((49152, 576), (192, 576), (576, 1536), (1536, 576), (151936, 896), (128, 896), (4864, 896)),
    *((151936, 1024), (1024, 3072), (3072, 1024), (128256, 4096), (1024, 4096), (14336, 4096)),
    *((4096, 14336), (50257, 768), (32003, 4096), (256206, 1024), (51865, 1280), (32100, 512)),
]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packed_size_on_shapes_of_real_models(kind):
    block = BY_NAME[kind]
    for n, k in REAL_SHAPES:
        if k % block.elements == 0:
            size = PackedWeight.empty(block.spec, n, k, device="meta").nbytes
            assert size <= allowed(kind) * n * (k // block.elements) * block.nbytes, (n, k)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_row_order_is_exact_too(tmp_path, kind):
    k = 2 * TYPES[kind][1]
    raw = random_blocks(kind, 128 * 2, np.random.default_rng(5)).reshape(128, -1)
    path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, (128, k), raw.tobytes())])
    order = rotary_row_order(2, 64, 64)
    got = packed(GGUFFile(path), "w", order).dequantize()
    assert same_bits(got, oracle(raw[order], kind))


def mxfp4(exponents: list[int], codes: list[list[int]]) -> np.ndarray:
    """[B, 17] uint8; codes: those of the low nibbles, the same for all 16, and of the high ones."""
    blocks = [[e, *[low | high << 4] * 16] for e, (low, high) in zip(exponents, codes, strict=True)]
    return np.array(blocks, np.uint8)


def read_mxfp4(folder: Path, blocks: np.ndarray) -> torch.Tensor:
    shape = (len(blocks), 32)
    path = write_gguf(folder / "x.gguf", {}, [Tensor("w", "MXFP4", shape, blocks.tobytes())])
    return packed(GGUFFile(path), "w").dequantize()


def test_mxfp4_at_the_ends_of_its_exponents(tmp_path):
    """e8m0 ends at 2^-127, one above GGUF's smallest: such blocks are exact by halved values, where
    these are in the table, above all zeros. At the other end the largest values overflow."""
    halves = [q for q, value in enumerate(E2M1) if value % 2 == 0 and value // 2 in E2M1]
    assert {abs(E2M1[q]) for q in halves} == {0, 2, 4, 6, 8, 12}
    cases = [(0, low, high) for low in halves for high in halves]
    cases += [(e, low, 15 - low) for e in (1, 2, 127, 251, 252) for low in range(16)]
    cases += [(255, 0, 1), (255, 8, 9), (254, 2, 10), (253, 4, 13)]  # 2^127 is finite
    blocks = mxfp4([e for e, _, _ in cases], [[low, high] for _, low, high in cases])
    want = oracle(blocks, "MXFP4")
    assert want.isfinite().all()
    assert same_bits(read_mxfp4(tmp_path, blocks), want)


@pytest.mark.parametrize(
    "exponent,code,message",
    [
        (0, 1, "an exponent of at least 1, got 0 with values of 0.5 or 1.5"),
        (0, 11, "an exponent of at least 1, got 0 with values of 0.5 or 1.5"),
        (253, 7, "values within float32, got an exponent of 253"),
        (254, 12, "values within float32, got an exponent of 254"),
        (255, 2, "values within float32, got an exponent of 255"),
    ],
)
@pytest.mark.parametrize("high", [False, True])
def test_mxfp4_blocks_without_an_exact_value_are_refused(tmp_path, exponent, code, message, high):
    blocks = np.tile(mxfp4([120], [[3, 4]]), (3, 1))
    blocks[2] = mxfp4([exponent], [[0, code] if high else [code, 0]])
    with pytest.raises(CheckpointError, match=f"'w'.*MXFP4.*row 2, group 0: expected {message}"):
        read_mxfp4(tmp_path, blocks)


def test_zeros_are_exact_in_every_type(tmp_path):
    """Encoders give blocks of zeros their smallest scale."""
    libgguf = pytest.importorskip("libgguf", reason="the package libgguf encodes these types")
    zeros = np.zeros((3, 512), np.float32)
    for kind in QUANTIZED:
        number = gguf.GGMLQuantizationType[kind]
        known = libgguf.row_size(number.value, 256) > 0
        raw = (
            libgguf.quantize_rows(zeros, number.value)
            if known
            else gguf.quants.quantize(zeros, number)
        )
        path = write_gguf(tmp_path / "x.gguf", {}, [Tensor("w", kind, (3, 512), raw.tobytes())])
        got = packed(GGUFFile(path), "w").dequantize()
        assert got.eq(0).all() and same_bits(got, oracle(raw, kind))


def test_the_documented_table_is_that_of_the_code():
    text = (Path(__file__).resolve().parent.parent / "docs" / "formats.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    documented = {row[0]: (row[1], *row[3:]) for row in rows if row[0] in QUANTIZED}
    assert tuple(documented) == QUANTIZED
    for kind, said in documented.items():
        block = BY_NAME[kind]
        disk, bits = 8 * block.nbytes / block.elements, block.spec.bits_per_weight
        code = (
            str(block.elements),
            str(block.spec),
            f"{disk:g}",
            f"{bits:g}",
            f"{bits / disk:.3f}",
        )
        assert said == code, kind
