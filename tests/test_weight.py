from dataclasses import replace

import pytest
import torch
from cases import FORMATS, random_plain
from conftest import Isa
from numerics import exact_weight
from torch import Tensor

from qkernels import ops
from qkernels.quant import PackedWeight, PlainWeight, QuantSpec
from qkernels.reference import dequantize

FIELDS = ("codes", "scale", "zero", "block_scale", "block_zero", "g_idx")


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    )


def assert_same(a: PlainWeight, b: PlainWeight) -> None:
    assert a.spec == b.spec
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and torch.equal(bits_of(x), bits_of(y)), name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_packs_exactly_and_at_its_own_size(
    name: str, generator: torch.Generator
) -> None:
    spec, disk_bits = FORMATS[name].spec, FORMATS[name].disk_bits
    plain = random_plain(spec, 256, 2048, generator)
    packed = plain.pack()
    assert_same(packed.unpack(), plain)
    table = 0 if packed.table is None else packed.table.nbytes
    perm = 0 if packed.perm is None else packed.perm.nbytes
    scales = (
        256 * packed.scale.element_size() if spec.group_size == -1 else 0
    )  # one per row: counted as free
    bits = 8 * (packed.nbytes - table - perm - scales) / (256 * 2048)
    assert bits == spec.bits_per_weight
    assert bits <= disk_bits * (1.10 if spec.bits < 4 else 1.03)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n, k", [(1, 1), (70, 300), (65, 1000)])
def test_ragged_shapes(name: str, n: int, k: int, generator: torch.Generator) -> None:
    plain = random_plain(FORMATS[name].spec, n, k, generator)
    packed = plain.pack()
    assert_same(packed.unpack(), plain)
    assert torch.equal(packed.dequantize(), plain.dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_dequantize_bitwise(
    isa: Isa, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    plain = random_plain(FORMATS[name].spec, 77, 300, generator)
    packed = plain.pack()
    args = packed.op_args()
    got = isa.ops.dequantize(*args, dtype)
    assert got.dtype == dtype and torch.equal(bits_of(got), bits_of(dequantize(*args, dtype)))
    ids = torch.tensor([0, 76, 5, 5, 33])
    rows = isa.ops.embedding(ids, *args, dtype, 0.5)
    assert torch.equal(
        bits_of(rows), bits_of((dequantize(*args, torch.float32)[ids] * 0.5).to(dtype))
    )
    assert isa.ops.embedding(ids[:0], *args, dtype, 1.0).shape == (0, 300)


@pytest.mark.parametrize("name", FORMATS)
def test_the_definition(name: str, generator: torch.Generator) -> None:
    """float32 decoding is within its few roundings of the exact value."""
    plain = random_plain(FORMATS[name].spec, 65, 530, generator)
    exact, magnitude = exact_weight(plain)
    assert ((plain.dequantize().double() - exact).abs() <= 4 * 2.0**-24 * magnitude).all()


def test_act_order(generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 64, zero="integer", act_order=True), 66, 200, generator)
    assert plain.g_idx is not None and not torch.equal(plain.g_idx.sort().values, plain.g_idx)
    packed = plain.pack()
    dense = plain.dequantize()
    s, z = plain.scale.float(), plain.zero
    column = s[:, plain.g_idx[17]] * (plain.codes[:, 17].float() - z[:, plain.g_idx[17]].float())
    assert torch.equal(dense[:, 17], column)
    assert torch.equal(packed.dequantize(), dense)
    assert torch.equal(ops.unpack(packed), plain.codes)
    ids = torch.tensor([[3, 65], [0, 3]])
    assert torch.equal(ops.embedding(ids, packed), dense[ids])
    with pytest.raises(ValueError, match="act-order"):
        packed.slice_cols(0, 64)


@pytest.mark.parametrize(
    "name", ["Q4_1", "Q4_K", "MXFP4", "compressed-tensors W8 row", "GPTQ W4 g128 act-order", "Q2_K"]
)
def test_row_blocks(name: str, generator: torch.Generator) -> None:
    plain = random_plain(FORMATS[name].spec, 200, 500, generator)
    packed = PackedWeight.empty(plain.spec, 200, 500)
    for start, stop in ((128, 200), (0, 64), (64, 128)):
        packed.write_rows(start, plain.rows(start, stop))
    whole = plain.pack()
    for key, tensor in whole.tensors().items():
        assert torch.equal(
            bits_of(packed.tensors()[key]) if key != "perm" else packed.perm,
            bits_of(tensor) if key != "perm" else tensor,
        )
    for start, stop, said in (
        (32, 64, "multiples|blocks"),
        (0, 63, "blocks"),
        (192, 264, "blocks"),
    ):
        with pytest.raises(ValueError, match=said):
            packed.write_rows(start, random_plain(plain.spec, stop - start, 500, generator))
    with pytest.raises(ValueError, match="cannot take"):
        packed.write_rows(0, random_plain(QuantSpec(5, 32), 64, 500, generator))


@pytest.mark.parametrize("name", [name for name in FORMATS if "act-order" not in name])
def test_slices(name: str, generator: torch.Generator) -> None:
    plain = random_plain(FORMATS[name].spec, 200, 1000, generator)
    packed = plain.pack()
    dense = plain.dequantize()
    for start, stop in ((0, 64), (64, 192), (128, 200)):
        part = packed.slice_rows(start, stop)
        assert torch.equal(part.dequantize(), dense[start:stop])
        assert part.codes.data_ptr() == packed.codes[start].data_ptr()  # a view
    for start, stop in ((0, 256), (256, 768), (768, 1000)):
        part = packed.slice_cols(start, stop)
        assert torch.equal(part.dequantize(), dense[:, start:stop])
        assert part.slice_rows(64, 128).n == 64
    for rows in ((1, 64), (0, 65), (64, 64), (0, 256)):
        with pytest.raises(ValueError, match="slice_rows"):
            packed.slice_rows(*rows)
    for cols in ((8, 256), (0, 250), (0, 1024)):
        with pytest.raises(ValueError, match="slice_cols"):
            packed.slice_cols(*cols)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_make_the_weight_again(name: str, generator: torch.Generator) -> None:
    packed = random_plain(FORMATS[name].spec, 70, 300, generator).pack()
    tensors = packed.tensors()
    again = PackedWeight.from_tensors(packed.spec, 70, 300, tensors)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert packed.to("cpu") is packed and packed.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="has the tensors"):
        PackedWeight.from_tensors(packed.spec, 70, 300, {**tensors, "extra": packed.codes})
    for part, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = tensor.clone()
            bad.view(torch.uint8).fill_(0xFF)  # NaN in every float type
            with pytest.raises(ValueError, match=f"{part} has values that are not finite"):
                PackedWeight.from_tensors(packed.spec, 70, 300, {**tensors, part: bad})
    with pytest.raises(ValueError, match="codes of"):
        PackedWeight.from_tensors(packed.spec, 70, 300, {**tensors, "codes": packed.codes[:64]})


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "compressed-tensors W4 g128", "NVFP4", "MXFP4"])
def test_scales_that_are_not_finite_are_refused_by_place(
    name: str, generator: torch.Generator
) -> None:
    plain = random_plain(FORMATS[name].spec, 200, 1000, generator)
    for field in ("scale", "zero", "block_scale", "block_zero"):
        tensor = getattr(plain, field)
        if tensor is None or tensor.dtype in (torch.int8, torch.uint8):
            continue
        bad = tensor.clone()
        if bad.dtype.itemsize == 1:
            bad.view(torch.uint8)[150, 2] = {torch.float8_e8m0fnu: 255, torch.float8_e4m3fn: 127}[
                bad.dtype
            ]
        else:
            bad[150, 2] = torch.inf
        wrong = replace(plain, **{field: bad})
        with pytest.raises(ValueError, match=rf"{field} of row 150, (group|block) 2 is (inf|nan)"):
            wrong.pack()
        with pytest.raises(ValueError, match="row 150"):  # also from a block of rows
            PackedWeight.empty(plain.spec, 200, 1000).write_rows(128, wrong.rows(128, 200))


def test_codes_beyond_their_bits_are_refused(generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 32), 70, 64, generator)
    plain.codes[69, 3] = 16
    with pytest.raises(ValueError, match=r"code 16 at row 69, column 3 is beyond 4 bits"):
        plain.pack()


@pytest.mark.parametrize("change, said", [
    (lambda g: g.fill_(0), "puts 256 columns into group 0"),
    (lambda g: g.sub_(1), "from 0 to 3, got -1"),
    (lambda g: g.add_(1), "from 0 to 3, got 4"),
])  # fmt: skip
def test_g_idx_is_checked(change, said: str, generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 64, act_order=True), 64, 256, generator)
    change(plain.g_idx)
    with pytest.raises(ValueError, match=said):
        plain.pack()


def test_one_g_idx_per_weight(generator: torch.Generator) -> None:
    spec = QuantSpec(4, 64, act_order=True)
    packed = PackedWeight.empty(spec, 128, 256)
    packed.write_rows(0, random_plain(spec, 64, 256, generator))
    with pytest.raises(ValueError, match="g_idx of rows 64 to 128 differs"):
        packed.write_rows(64, random_plain(spec, 64, 256, generator))


def test_ill_formed_weights_are_refused(generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 32, zero="minimum"), 64, 64, generator)
    for change, said in (
        ({"codes": plain.codes.int()}, "codes of .* must be torch.uint8"),
        (
            {"scale": plain.scale[:, :1]},
            r"scale of .* must be torch.float16 \[64, 2\], got torch.float16 \[64, 1\]",
        ),
        ({"zero": None}, "needs a zero"),
        ({"block_scale": plain.scale}, "has no block_scale"),
        ({"codes": plain.codes[0]}, r"\[N, K\]"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "has no g_idx"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(plain, **change)
    with pytest.raises(ValueError, match="n > 0"):
        PackedWeight.empty(QuantSpec(4), 0, 64)


def weight_errors(args: list) -> list[tuple[int, object, str]]:
    """(position in W, the wrong value, the error it must give)."""
    codes, scale = args[0], args[1]
    return [
        (0, codes[:, :-1].contiguous(), r"codes must be \[128, 160\], got \[128, 159\]"),
        (0, codes.int(), "codes must be int8, got int32"),
        (0, codes.t().contiguous().t(), "codes must be contiguous"),
        (1, scale[:1].contiguous(), r"scale must be \[2, 10, 64\], got \[1, 10, 64\]"),
        (1, scale.double(), "scale must be float32, float16, bfloat16.*got float64"),
        (
            2,
            scale.float(),
            r"zero must be uint8 .* of the scale's type float16 \(minima\), got float32",
        ),
        (4, scale, "block_zero"),
        (5, torch.zeros(15, dtype=torch.int8), r"table must be \[16\], got \[15\]"),
        (6, 7, "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        (7, 24, "group_size must be a positive multiple of 16, got 24"),
        (7, 0, "group_size must be a positive multiple of 16, got 0"),
        (8, 0, "n > 0 and k > 0, got n = 0"),
        (9, -5, "got n = 70, k = -5"),
    ]


@pytest.mark.parametrize("index", range(13))
@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference", "fake"])
def test_the_same_errors_everywhere(namespace: str, index: int, generator: torch.Generator) -> None:
    args = list(random_plain(QuantSpec(4, 32, zero="minimum"), 70, 300, generator).pack().op_args())
    if index == 6:
        args[2] = None
    if index == 7:
        args[2] = None
    position, wrong, said = weight_errors(args)[index]
    args[position] = wrong
    if namespace == "fake":
        args = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    ops_of = torch.ops.qkernels if namespace == "fake" else getattr(torch.ops, namespace)
    with pytest.raises(RuntimeError, match=said):
        ops_of.dequantize(*args, torch.float32)
    with pytest.raises(RuntimeError, match=said):
        ops_of.unpack(*args)
    with pytest.raises(RuntimeError, match=said):
        ops_of.embedding(
            torch.zeros(1, dtype=torch.int64, device=args[0].device), *args, torch.float32, 1.0
        )


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_bad_values(namespace: str, generator: torch.Generator) -> None:
    ops_of = getattr(torch.ops, namespace)
    args = random_plain(QuantSpec(4, 32), 70, 300, generator).pack().op_args()
    for ids in ([0, 70], [-1]):
        with pytest.raises(RuntimeError, match=f"ids must be from 0 to 69, got {ids[-1]}"):
            ops_of.embedding(torch.tensor(ids), *args, torch.float32, 1.0)
    with pytest.raises(RuntimeError, match="ids must be int64, got int32"):
        ops_of.embedding(torch.tensor([1], dtype=torch.int32), *args, torch.float32, 1.0)
    with pytest.raises(
        RuntimeError, match="dtype must be float32, float16 or bfloat16, got float64"
    ):
        ops_of.dequantize(*args, torch.float64)
    with pytest.raises(RuntimeError, match="codes must be below 2\\^bits = 16"):
        ops_of.pack(torch.full((2, 20), 16, dtype=torch.uint8), 4, 32, False)
    for bits, group, two_level, said in (
        (7, 32, False, "bits"),
        (4, 20, False, "group_size"),
        (4, 48, True, "divides 256"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ops_of.pack(torch.zeros(2, 20, dtype=torch.uint8), bits, group, two_level)


@pytest.mark.parametrize(
    "name", ["Q4_1", "Q2_K", "Q5_K", "IQ4_XS"]
)  # opcheck itself multiplies, which float8 cannot
@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_opcheck(namespace: str, name: str, generator: torch.Generator) -> None:
    plain = random_plain(FORMATS[name].spec, 70, 300, generator)
    packed = plain.pack()
    ops_of = getattr(torch.ops, namespace)
    torch.library.opcheck(
        ops_of.pack.default, (plain.codes, packed.spec.bits, packed.group, packed.spec.two_level)
    )
    torch.library.opcheck(ops_of.unpack.default, packed.op_args())
    torch.library.opcheck(ops_of.dequantize.default, (*packed.op_args(), torch.bfloat16))
    torch.library.opcheck(
        ops_of.embedding.default, (torch.tensor([1, 69]), *packed.op_args(), torch.float32, 2.0)
    )


def test_compiles(generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32, zero="minimum"), 70, 300, generator).pack()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(ids: Tensor) -> Tensor:
        return ops.embedding(ids, packed) + ops.dequantize(packed)[ids]

    ids = torch.tensor([5, 1])
    assert torch.equal(run(ids), 2 * packed.dequantize()[ids])
