"""linear and linear_quant in Triton: the cases of the CUDA kernels, fewer of them, as an
interpreted product takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_cuda_linear_int8 as int8
import torch
from cases import FORMATS, LINEAR_SPECS, random_plain, random_x
from gpus import Gpu, triton_gpu
from numerics import assert_within, linear_exact
from test_cuda_linear import exact_plain, exact_result, run, small_x, sorted_plain
from test_cuda_linear import test_no_tokens as test_no_tokens

from qkernels import triton
from qkernels.ops import registry
from qkernels.quant import QuantSpec

HALVES = [torch.float16, torch.bfloat16]
DENSE = 385


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_every_weight_exactly(gpu: Gpu, name: str, generator: torch.Generator) -> None:
    """By gemv; below by tile."""
    plain = exact_plain(LINEAR_SPECS[name], 40, 100, generator)
    packed = plain.pack()
    x = small_x(1, 100, HALVES[len(name) % 2], generator)
    assert torch.equal(run(gpu, x, packed), exact_result(x, sorted_plain(plain, packed)))


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_every_weight_with_int8_activations(
    gpu: Gpu, name: str, generator: torch.Generator
) -> None:
    plain = random_plain(LINEAR_SPECS[name], 40, 100, generator)
    groups = int8.act_groups(LINEAR_SPECS[name], 100)
    int8.check(gpu, plain, 17, groups[len(name) % len(groups)], generator, bias=True)


@pytest.mark.parametrize("group", [48, 128, -1])
def test_groups_of_activations_and_weights_may_differ(
    gpu: Gpu, group: int, generator: torch.Generator
) -> None:
    """Rows of activations may also be padded further than the weight's, or less."""
    plain = random_plain(QuantSpec(4, group, zero="integer"), 40, 150, generator)
    wide = plain.spec.group(150) if group > 0 else int8.whole_row(150)
    for act_group in (16, 32, 48, 96, 144, 160, 256):
        if not (wide % act_group and act_group % wide):
            for m in (1, 20):
                int8.check(gpu, plain, m, act_group, generator)


# Widths, zeros and scales of each kind in both kernels: a misplaced code or scale shows as itself.
ONE_HOT = ["W2 g16 uint4 min", "W3 g32 float16 zero", "W4 g32 float16", "W4 g32 int8 min"]
ONE_HOT += ["W5 g32 float16 min", "W6 g16 int8", "W8 g32 float16 zero", "W8 row bfloat16"]
ONE_HOT += [str(FORMATS["MXFP4"].spec), str(FORMATS["NVFP4"].spec)]


@pytest.mark.parametrize("name", ONE_HOT)
def test_one_hot_activations_read_single_weights(
    gpu: Gpu, name: str, generator: torch.Generator
) -> None:
    """Bit for bit what dequantize has, rounded to the type, for any scale."""
    packed = random_plain(LINEAR_SPECS[name], 70, 48, generator).pack()
    dense = torch.ops.qkernels_reference.dequantize(*packed.op_args(), torch.float32)
    x = torch.eye(48, dtype=torch.float16)
    assert torch.equal(run(gpu, x, packed), dense.T.half())
    for row in (0, 15, 16, 47):
        one = x[row : row + 1]
        assert torch.equal(run(gpu, one, packed), dense.T.half()[row : row + 1])
    codes = torch.eye(48, dtype=torch.int8)
    for part, want in ((codes, dense.T), (codes[21:22], dense.T[21:22])):
        part = part.contiguous()
        act = (part, torch.ones(len(part), 3), part.view(len(part), -1, 16).sum(2).short())
        assert torch.equal(int8.run(gpu, act, packed, None, torch.float32), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 7])
def test_within_the_bound_of_rounding(
    gpu: Gpu, m: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Long rows, in several parts."""
    for name, k in (("W4 g128 float16 zero", 1023), ("W6 g16 int8", 300)):
        plain = random_plain(LINEAR_SPECS[name], 64, k, generator)
        x = random_x(m, k, dtype, generator)
        bias, residual = torch.randn(64, generator=generator), x[:, :64].contiguous()
        exact, bound = linear_exact(x, plain, bias, dtype, residual)
        assert_within(run(gpu, x, plain.pack(), bias, residual), exact, bound)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("m", [1, 16, 70, DENSE])
def test_bias_and_residual(
    gpu: Gpu, m: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    n, k = 77, 100
    plain = exact_plain(QuantSpec(4, 32), n, k, generator)
    packed, x = plain.pack(), small_x(m, k, dtype, generator)
    bias = torch.randint(-8, 9, (n,), generator=generator) / 4
    residual = (torch.randint(-8, 9, (m, 2 * n), generator=generator) / 4).to(dtype)[:, n:]
    product = exact_result(x.double(), plain)
    before = product.to(dtype).double() if m == DENSE else product  # torch rounds the product
    for b, r in ((bias, None), (None, residual), (bias, residual)):
        want = before + (0 if b is None else b.double()) + (0 if r is None else r.double())
        assert torch.equal(run(gpu, x, packed, b, r), want.to(dtype))


def test_dense_in_parts(gpu: Gpu, generator: torch.Generator) -> None:
    """Of a large matrix as many rows are dequantized as 64 KB hold, where it is interpreted."""
    for spec in (QuantSpec(4, 32, zero="integer"), QuantSpec(4, 32, "int8", "minimum")):
        plain = exact_plain(spec, 330, 256, generator)
        x = small_x(2, 256, torch.float32, generator)
        assert torch.equal(run(gpu, x, plain.pack()), exact_result(x, plain))


@pytest.mark.parametrize("m", [1, 5])
def test_rows_of_a_wider_tensor(gpu: Gpu, m: int, generator: torch.Generator) -> None:
    """Not aligned, and NaN behind K: it belongs to another tensor."""
    plain = exact_plain(QuantSpec(4, 32), 66, 97, generator)
    wide = torch.full((m, 131), torch.nan, dtype=torch.float16)
    wide[:, 3:100] = small_x(m, 97, torch.float16, generator)
    x = gpu.to(wide)[:, 3:100]
    got = gpu.ops.linear(x, *gpu.to(plain.pack().op_args()), None, "float", 0).cpu()
    assert torch.equal(got, exact_result(x.cpu(), plain))


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_codes_do_not_overflow(gpu: Gpu, bits: int, generator: torch.Generator) -> None:
    k = 1024
    plain = random_plain(QuantSpec(bits, -1), 64, k, generator)
    plain.codes.fill_((1 << bits) - 1)
    for m in (1, 16):
        codes = torch.full((m, k), 127, dtype=torch.int8)
        act = (codes, torch.ones(m, 1), codes.view(m, -1, 16).sum(2).short())
        exact, bound = linear_exact(int8.value(act, k), plain, None, torch.float32)
        assert_within(int8.run(gpu, act, plain.pack(), None, torch.float32), exact, bound)


def test_a_weight_that_is_not_aligned(gpu: Gpu, generator: torch.Generator) -> None:
    weight = list(random_plain(QuantSpec(4, 32), 64, 64, generator).pack().op_args())
    odd = torch.zeros(weight[0].numel() + 1, dtype=torch.int8)[1:].view(weight[0].shape)
    args = gpu.to([torch.zeros(1, 64).half(), odd, *weight[1:], None])
    with pytest.raises(RuntimeError, match="codes must start at a multiple of 16 bytes"):
        gpu.ops.linear(*args, "float", 0)


def test_int8_of_linear_is_linear_quant(gpu: Gpu, generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()
    x, weight = gpu.to(random_x(3, 100, torch.float16, generator)), gpu.to(packed.op_args())
    act = gpu.ops.quantize_act(x, 32)
    want = gpu.ops.linear_quant(*act, *weight, None, torch.float16)
    assert torch.equal(gpu.ops.linear(x, *weight, None, "int8", 32), want)


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 64, 32, generator).pack()
    x, weight = gpu.to(random_x(2, 32, torch.float16, generator)), gpu.to(packed.op_args())
    torch.library.opcheck(gpu.ops.linear.default, (x, *weight, None, "float", 0, None))
    act = gpu.ops.quantize_act(x, 32)
    torch.library.opcheck(gpu.ops.linear_quant.default, (*act, *weight, None, torch.float16))

    def block(x: torch.Tensor) -> torch.Tensor:
        return gpu.ops.linear(x.relu(), *weight, None, "float", 0) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


# ---- shapes of tiles ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tuning = pytest.importorskip("qkernels.triton.tuning")
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    return Path(tuning.cache_file(torch.device("cpu")))


def test_a_search_keeps_the_fastest_shape_on_disk(
    gpu: Gpu, cache: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    from qkernels.triton import tuning

    if not triton.interpreted():
        pytest.skip("times are those of the test")
    tried: list[tuning.Config] = []
    wanted = tuning.TileConfig(2, 16, 4, 4, 3)

    def timed(config: tuning.Config) -> float:
        tried.append(config)
        return 1.0 if config == wanted else 2.0

    shapes = [wanted, tuning.TileConfig(1, 16, 8, 4, 2)]
    monkeypatch.setattr(tuning, "candidates", lambda key: shapes)
    monkeypatch.setattr(tuning, "time_of", lambda call: timed(call.args[0]))
    plain = exact_plain(QuantSpec(4, 32), 64, 64, generator)
    x = small_x(3, 64, torch.float16, generator)
    want = exact_result(x, plain)
    assert torch.equal(run(gpu, x, plain.pack()), want) and not tried and not cache.exists()
    monkeypatch.setenv("QKERNELS_TRITON_AUTOTUNE", "1")
    for _ in range(2):
        assert torch.equal(run(gpu, x, plain.pack()), want)
    assert len(tried) == 3  # of the table, and the others; once
    assert json.loads(cache.read_text()) == {
        "tile W4 g32 float16 symmetric float16 M=4 64x64": list(wanted)
    }
    monkeypatch.delenv("QKERNELS_TRITON_AUTOTUNE")
    tuning._found.clear(), tuning._chosen.clear()
    key = tuning.Key("tile", 4, "g32 float16 symmetric", torch.float16, 3, 64, 64)
    assert tuning.choose(key, gpu.device, lambda config: None) == wanted


def test_a_file_that_is_none_is_told_of(gpu: Gpu, cache: Path) -> None:
    from qkernels.triton import tuning

    cache.parent.mkdir(parents=True, exist_ok=True)
    key = tuning.Key("gemv", 4, "", torch.float16, 1, 64, 64)
    for text in ("{", '{"a": [1]}', "[]", '{"a": ["x", 1, 2]}', '{"a": [3, 16, 8, 4, 2]}'):
        cache.write_text(text)
        tuning._found.clear(), tuning._chosen.clear()
        with pytest.warns(UserWarning, match="is no file of tile shapes .* delete it"):
            found = tuning.choose(key, gpu.device, lambda config: None)
        assert found == tuning.of_table(key, tuning.class_of(gpu.device))


def test_every_class_of_gpu_has_a_shape_for_every_number_of_tokens() -> None:
    from qkernels.triton import tuning

    for kind in ("sm80", "sm90", "sm100", "gfx9", "gfx11", "interpreter"):
        for m in (1, 2, 15, 16, 17, 100, 384):
            key = tuning.Key("gemv" if m == 1 else "tile", 4, "", torch.float16, m, 64, 64)
            assert tuning.of_table(key, kind)
    assert registry.fake("linear")


CLASSES = ["sm80", "sm90", "sm100", "gfx9", "gfx11"]


@pytest.fixture
def launched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that kernels are launched with, as the tables have them."""
    from qkernels.triton import linear as launches

    if not triton.interpreted():
        pytest.skip("a GPU may have no room for the shapes of others")
    monkeypatch.delenv("QKERNELS_TRITON_AUTOTUNE", raising=False)
    shapes: list[tuple[int, ...]] = []

    class Recorded:
        def __init__(self, kernel: Any, constants: str) -> None:
            self.kernel, self.constants = kernel, constants.split()

        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                shapes.append(tuple(constants[name] for name in self.constants))
                self.kernel[grid](*args, **constants)

            return launch

    for name, constants in (
        ("linear_gemv_kernel", "U num_warps STAGES"),
        ("linear_tile_kernel", "B M U num_warps num_stages"),
    ):
        monkeypatch.setattr(launches, name, Recorded(getattr(launches, name), constants))
    return shapes


@pytest.mark.parametrize("m, row", [(1, 1), (16, 16), (20, 32), (64, 64), (100, 128)])
@pytest.mark.parametrize("kind", CLASSES)
def test_shapes_of_every_class_of_gpu(
    gpu: Gpu,
    launched: list[tuple[int, ...]],
    kind: str,
    m: int,
    row: int,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    """Of a real one; groups have the columns of the largest steps, of which there are several, in
    one part and in two."""
    from qkernels.triton import linear as launches
    from qkernels.triton import tuning

    monkeypatch.setattr(tuning, "class_of", lambda device: kind)
    n, k = 130 if m == 64 else 70 if m > 64 else 40, 300 if m == 1 else 200

    def shape(kind: str, row: int) -> tuple[int, ...]:
        return tuning._GEMV[kind] if m == 1 else tuning._TILE[kind, row]

    monkeypatch.setattr(launches, "_parts", lambda *args: 1)
    plain = random_plain(QuantSpec(4, 128), n, k, generator)
    x = random_x(m, k, torch.float16, generator)
    bias = torch.randn(n, generator=generator)
    residual = random_x(m, n, torch.float16, generator)
    exact, bound = linear_exact(x, plain, bias, torch.float16, residual)
    assert_within(run(gpu, x, plain.pack(), bias, residual), exact, bound)
    assert launched == [shape(kind, row)] != [shape("interpreter", row)]

    monkeypatch.setattr(launches, "_parts", lambda *args: 2)
    bits = 4 if m in (16, 64) else 8
    plain = random_plain(QuantSpec(bits, 128), n, k, generator)
    int8.check(gpu, plain, m, 128, generator, torch.float16, bias=m != 64)
    wanted = shape(kind, min(64, row) if kind == "sm100" else row)
    if m == 1:
        wanted = (wanted[0] // 2, *wanted[1:])  # of 8 bits
    assert launched[1:] == [wanted]
