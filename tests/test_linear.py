"""linear and linear_quant: every kind of weight on every set of kernels, against the exact
result."""

import pytest
import torch
from cases import LINEAR_SPECS, SHAPES, STEEP, TOKENS, random_plain, random_x
from conftest import Isa
from numerics import assert_within, linear_exact
from torch import Tensor

from qkernels import ops, reference
from qkernels.ops.linear import default_act_group
from qkernels.quant import E2M1, PackedWeight, PlainWeight, QuantSpec
from qkernels.quant.spec import BITS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTS = ["int8", "float"]
MIN = QuantSpec(4, 32, zero="minimum")


def seen_by_kernel(x: Tensor, act: str, group: int) -> Tensor:
    """x as float64, after quantization where there is one (test_act.py holds the kernels'
    bitwise)."""
    if act == "float":
        return x.double()
    codes, scale, _ = reference.quantize_act(x, group)
    values = codes.double().view(len(x), -1, group) * scale.double()[..., None]
    return values.view(len(x), -1)[:, : x.shape[1]]


def check(
    op,
    x: Tensor,
    plain: PlainWeight,
    packed: PackedWeight,
    bias: Tensor | None,
    act: str,
    group: int,
) -> None:
    exact, bound = linear_exact(seen_by_kernel(x, act, group), plain, bias, x.dtype)
    got = op(x, *packed.op_args(), bias, act, group)
    assert got.dtype == x.dtype
    assert_within(got, exact, bound)


def plain_without_order(plain: PlainWeight, packed: PackedWeight) -> PlainWeight:
    """What the kernels see of an act-order weight: its columns sorted by group."""
    if packed.perm is None:
        return plain
    spec = QuantSpec(**{**plain.spec.to_dict(), "act_order": False})
    return PlainWeight(spec, plain.codes[:, packed.perm].contiguous(), plain.scale, plain.zero)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_every_weight(isa: Isa, name: str, act: str, generator: torch.Generator) -> None:
    for n, k in SHAPES:
        plain = random_plain(LINEAR_SPECS[name], n, k, generator)
        packed = plain.pack()
        seen = plain_without_order(plain, packed)
        for m in (1, 4, 17):
            dtype = DTYPES[(m + n) % 3]
            bias = torch.randn(n, generator=generator) if m % 2 else None
            check(
                isa.ops.linear,
                random_x(m, k, dtype, generator),
                seen,
                packed,
                bias,
                act,
                default_act_group(packed),
            )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_of_tokens(
    isa: Isa, bits: int, dtype: torch.dtype, act: str, generator: torch.Generator
) -> None:
    plain = random_plain(QuantSpec(bits, 32, zero="minimum"), 130, 200, generator)
    packed = plain.pack()
    for m in (*TOKENS, 300):
        check(isa.ops.linear, random_x(m, 200, dtype, generator), plain, packed, None, act, 32)
    empty = isa.ops.linear(torch.zeros(0, 200, dtype=dtype), *packed.op_args(), None, act, 32)
    assert empty.shape == (0, 130) and empty.dtype == dtype


@pytest.mark.parametrize(
    "name",
    [
        "W8 g32 float16",
        "W8 row float16",
        "W8 g32 float16 zero",
        "W6 g16 int8",
        "W5 g32 float16",
        "W4 g32 int8 min",
    ],
)
def test_long_rows(isa: Isa, name: str, with_threads, generator: torch.Generator) -> None:
    """So long that the codes of many tokens' rows are taken in chunks of columns: the same bits as
    of few tokens, which take them whole."""
    plain = random_plain(LINEAR_SPECS[name], 70, 17000, generator)
    packed = plain.pack()
    group = default_act_group(packed)
    x = random_x(23, 17000, torch.float32, generator)
    bias = torch.randn(70, generator=generator)
    check(isa.ops.linear, x, plain, packed, bias, "int8", group)
    many = isa.ops.linear(x, *packed.op_args(), bias, "int8", group)
    for i in range(0, 23, 6):
        few = isa.ops.linear(x[i : i + 6], *packed.op_args(), bias, "int8", group)
        assert torch.equal(few, many[i : i + 6])
    with_threads(3)  # the second one starts with half a block of rows
    assert torch.equal(isa.ops.linear(x, *packed.op_args(), bias, "int8", group), many)


@pytest.mark.parametrize("k", [64, 4096, 9000])
def test_tokens_around_the_ends_of_blocks(isa: Isa, k: int, generator: torch.Generator) -> None:
    """Blocks of tokens end at multiples of 120; long rows take one at a time, short ones two."""
    packed = random_plain(LINEAR_SPECS["W8 g32 float16"], 40, k, generator).pack()
    x = random_x(245, k, torch.float32, generator)
    few = [isa.ops.linear(part, *packed.op_args(), None, "int8", 32) for part in x.split(6)]
    for m in (121, 122, 125, 241, 245):
        many = isa.ops.linear(x[:m], *packed.op_args(), None, "int8", 32)
        assert torch.equal(torch.cat(few)[:m], many)


@pytest.mark.parametrize(
    "group, act_group", [(32, 128), (128, 32), (16, 16), (64, 256), (-1, 32), (-1, 16)]
)
def test_groups_of_activations_and_weights_may_differ(
    isa: Isa, group: int, act_group: int, generator: torch.Generator
) -> None:
    for bits in (4, 8):
        plain = random_plain(QuantSpec(bits, group, zero="integer"), 70, 576, generator)
        for m in (1, 9):
            check(
                isa.ops.linear,
                random_x(m, 576, torch.float32, generator),
                plain,
                plain.pack(),
                None,
                "int8",
                act_group,
            )


@pytest.mark.parametrize("bits", BITS)
def test_largest_codes_do_not_saturate(isa: Isa, bits: int) -> None:
    """All codes and activations at their ends, over long rows: sums of 16 bits overflow where they
    are not widened in time, and pairs of 8-bit products where they are split wrongly."""
    k = 4096
    specs = [QuantSpec(bits, -1), QuantSpec(bits, 16, zero="minimum"), QuantSpec(bits, 32)]
    if bits == 4:
        specs += [QuantSpec(4, -1, table=STEEP), QuantSpec(4, 32, table=STEEP)]
    for spec in specs:
        for code in (0, (1 << bits) - 1):
            groups = spec.groups(k)
            plain = PlainWeight(
                spec,
                torch.full((64, k), code, dtype=torch.uint8),
                torch.ones(64, groups).half(),
                torch.zeros(64, groups).half() if spec.zero == "minimum" else None,
            )
            packed = plain.pack()
            for sign in (1.0, -1.0):
                x = torch.full((5, k), sign)
                check(isa.ops.linear, x, plain, packed, None, "int8", default_act_group(packed))


def test_one_hot_activations_read_single_weights(isa: Isa, generator: torch.Generator) -> None:
    """Row k of the result is column k of the weight: a misplaced code shows as itself."""
    for spec in (
        *(QuantSpec(bits, 32) for bits in BITS),
        QuantSpec(4, 32, "int8"),
        QuantSpec(4, 32, table=STEEP),
    ):
        plain = random_plain(spec, 70, 96, generator)
        got = isa.ops.linear(torch.eye(96), *plain.pack().op_args(), None, "float", 0)
        exact, bound = linear_exact(torch.eye(96), plain, None, torch.float32)
        assert_within(got, exact, bound)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_minima_of_8_bit_floats(isa: Isa, scale: str, act: str, generator: torch.Generator) -> None:
    """No QuantSpec has them, but the ops take them: they must not be ignored."""
    weight = list(random_plain(QuantSpec(4, 32, scale), 70, 96, generator).pack().op_args())
    weight[2] = weight[1].view(torch.uint8).flip(2).view(weight[1].dtype)  # of another row
    x = random_x(3, 96, torch.float32, generator)
    got = isa.ops.linear(x, *weight, None, act, 32)
    dense = torch.ops.qkernels_reference.dequantize(*weight, torch.float32).double()
    minima = weight[2].float().abs().max().double()
    seen, width = seen_by_kernel(x, act, 32), dense.abs() + 2 * minima
    assert_within(got, seen @ dense.T, 96 * 2.0**-23 * (seen.abs() @ width.T))


@pytest.mark.parametrize("flush", [False, True])
def test_every_e4m3_scale_is_exact(isa: Isa, flush: bool, with_threads) -> None:
    """Bit for bit what dequantize has, also where the CPU flushes subnormal numbers to zero."""
    generator = torch.Generator().manual_seed(1)
    packed = random_plain(QuantSpec(4, 16, "e4m3"), 64, 64, generator).pack()
    every = torch.arange(256, dtype=torch.uint8).view(1, 4, 64)
    packed.scale.view(torch.uint8).copy_(every.masked_fill((every & 0x7F) == 0x7F, 0))  # no NaN
    want = torch.ops.qkernels_reference.dequantize(*packed.op_args(), torch.float32)
    with_threads(1)  # the setting is a thread's own
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        got = isa.ops.linear(torch.eye(64), *packed.op_args(), None, "float", 0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got.T, want)


@pytest.mark.parametrize("act", ACTS)
def test_bitwise_for_any_number_of_threads(
    isa: Isa, act: str, with_threads, generator: torch.Generator
) -> None:
    for name in (str(MIN), "W8 g32 float16", "W4 g32 int8 min", "W6 g16 int8", "W5 g32 float16"):
        packed = random_plain(LINEAR_SPECS[name], 330, 600, generator).pack()
        for m in (1, 6, 70):
            x = random_x(m, 600, torch.bfloat16, generator)
            results = []
            for threads in (1, 2, 3):
                with_threads(threads)
                results.append(
                    isa.ops.linear(x, *packed.op_args(), None, act, default_act_group(packed))
                )
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("act", ACTS)
def test_a_token_alone_gives_what_it_gives_in_a_batch(
    isa: Isa, act: str, generator: torch.Generator
) -> None:
    plain = random_plain(MIN, 130, 600, generator)
    packed = plain.pack()
    x = random_x(33, 600, torch.float32, generator)
    together = isa.ops.linear(x, *packed.op_args(), None, act, 32)
    for i in (0, 7, 32):
        alone = isa.ops.linear(x[i : i + 1], *packed.op_args(), None, act, 32)
        _, bound = linear_exact(seen_by_kernel(x[i : i + 1], act, 32), plain, None, x.dtype)
        assert ((alone - together[i : i + 1]).abs().double() <= 2 * bound).all()


@pytest.mark.parametrize("act", ACTS)
def test_rows_a_stride_apart(isa: Isa, act: str, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 70, 100, generator).pack()
    x = random_x(12, 300, torch.float32, generator)[::3, 50:150]
    assert not x.is_contiguous()
    got = isa.ops.linear(x, *packed.op_args(), None, act, 32)
    assert torch.equal(got, isa.ops.linear(x.contiguous(), *packed.op_args(), None, act, 32))


@pytest.mark.parametrize(
    "name", [str(MIN), "W8 g32 float16 zero", "W4 g32 int8 min", "W8 row float16"]
)
def test_linear_quant_is_the_second_half(isa: Isa, name: str, generator: torch.Generator) -> None:
    packed = random_plain(LINEAR_SPECS[name], 130, 300, generator).pack()
    group, bias = default_act_group(packed), torch.randn(130, generator=generator)
    for m in (0, 1, 5, 40):
        x = random_x(m, 300, torch.bfloat16, generator)
        act = isa.ops.quantize_act(x, group)
        got = isa.ops.linear_quant(*act, *packed.op_args(), bias, torch.bfloat16)
        assert torch.equal(got, isa.ops.linear(x, *packed.op_args(), bias, "int8", group))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_reference_takes_every_weight(bits: int, act: str, generator: torch.Generator) -> None:
    specs = [QuantSpec(bits, 32, zero=zero) for zero in ("symmetric", "integer", "minimum")]
    specs += [QuantSpec(bits, 16, "int8"), QuantSpec(bits, 16, "uint4", "minimum")]
    specs += (
        [QuantSpec(bits, 32, "e8m0", table=E2M1), QuantSpec(bits, 16, "e4m3", table=E2M1)]
        if bits == 4
        else []
    )
    for spec in specs:
        plain = random_plain(spec, 70, 100, generator)
        packed = plain.pack()
        x = random_x(3, 100, torch.float32, generator)
        check(
            torch.ops.qkernels_reference.linear,
            x,
            plain,
            packed,
            torch.randn(70),
            act,
            default_act_group(packed),
        )


def test_act_order_and_leading_dimensions(generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 128, zero="integer", act_order=True), 70, 300, generator)
    packed = plain.pack()
    x = random_x(6, 300, torch.float32, generator)
    exact, bound = linear_exact(x, plain, None, x.dtype)
    got = ops.linear(x.view(2, 3, 300), packed, act="float")
    assert_within(got.view(6, 70), exact, bound)
    in_order = seen_by_kernel(x[:, packed.perm], "int8", 128)
    exact, bound = linear_exact(in_order, plain_without_order(plain, packed), None, x.dtype)
    assert_within(ops.linear(x, packed, act="int8"), exact, bound)
    with pytest.raises(RuntimeError, match="act-order"):
        ops.linear_quant(ops.quantize_act(x, 128), packed)


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference", "fake"])
def test_errors(namespace: str, generator: torch.Generator) -> None:
    device = "meta" if namespace == "fake" else "cpu"
    of = getattr(torch.ops, "qkernels" if namespace == "fake" else namespace)
    weight = random_plain(MIN, 70, 300, generator).pack().to(device).op_args()
    x = torch.zeros(2, 300, device=device)
    bias = torch.zeros(70, device=device)
    for args, said in (
        ((x[:, :-1], *weight, bias, "int8", 32), r"linear: x must be \[M, 300\], got \[2, 299\]"),
        (
            (x.double(), *weight, bias, "int8", 32),
            "x must be float32, float16 or bfloat16, got float64",
        ),
        ((x[0], *weight, bias, "int8", 32), "x must have 2 dimensions"),
        ((x.t().contiguous().t(), *weight, bias, "float", 0), "dense in its last dimension"),
        ((x, *weight, bias.half(), "int8", 32), "bias must be float32, got float16"),
        ((x, *weight, bias[1:].contiguous(), "int8", 32), r"bias must be \[70\], got \[69\]"),
        ((x, *weight, bias, "int4", 32), 'act must be "int8" or "float", got "int4"'),
        ((x, *weight, bias, "int8", 0), "act_group must be a positive multiple of 16, got 0"),
        ((x, *weight, bias, "int8", 40), "act_group must be a positive multiple of 16, got 40"),
        ((x, *weight, bias, "int8", 2**62), "act_group must be at most 1073741824"),
        ((x, *weight, bias, "int8", 48), "must divide the other, got 32 and 48"),
        ((x, weight[0][:64], *weight[1:], bias, "int8", 32), r"codes must be \[128, 160\]"),
    ):
        with pytest.raises(RuntimeError, match=said):
            of.linear(*args)
    codes, scale, sums = of.quantize_act(x, 32)
    for args, said in (
        (
            (codes[:, :288].contiguous(), scale, sums, *weight, None, torch.float32),
            "act_codes must have k = 300 columns",
        ),
        (
            (codes.float(), scale, sums, *weight, None, torch.float32),
            "act_codes must be int8, got float32",
        ),
        (
            (codes, scale[:, :7].contiguous(), sums, *weight, None, torch.float32),
            "rounded up to whole groups of act_scale",
        ),
        (
            (codes, scale[:1].contiguous(), sums, *weight, None, torch.float32),
            r"act_scale must be \[2, \*\], got \[1, 10\]",
        ),
        (
            (codes, scale, sums[:, 1:].contiguous(), *weight, None, torch.float32),
            r"act_sums must be \[2, 20\], got \[2, 19\]",
        ),
        (
            (codes, scale, sums.int(), *weight, None, torch.float32),
            "act_sums must be int16, got int32",
        ),
        (
            (codes, scale, sums, *weight, None, torch.float64),
            "dtype must be float32, float16 or bfloat16, got float64",
        ),
    ):
        with pytest.raises(RuntimeError, match=said):
            of.linear_quant(*args)


def test_mixed_devices_are_refused(generator: torch.Generator) -> None:
    packed = random_plain(MIN, 70, 300, generator).pack()
    of, x = torch.ops.qkernels, torch.zeros(2, 300, device="meta")
    with pytest.raises(RuntimeError, match="codes is on cpu, but x is on meta"):
        of.linear(x, *packed.op_args(), None, "float", 0)
    with pytest.raises(RuntimeError, match="bias is on cpu, but x is on meta"):
        of.linear(x, *packed.to("meta").op_args(), torch.zeros(70), "float", 0)
    act = of.quantize_act(x, 32)
    for at, name in enumerate(("act_scale", "act_sums"), start=1):
        mixed = [torch.zeros_like(t, device="cpu") if i == at else t for i, t in enumerate(act)]
        with pytest.raises(RuntimeError, match=f"{name} is on cpu, but act_codes is on meta"):
            of.linear_quant(*mixed, *packed.to("meta").op_args(), None, torch.float32)


@pytest.mark.parametrize("op", ["linear", "linear_quant", "embedding", "unpack", "dequantize"])
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32, "int8", "minimum"), QuantSpec(4, 32, table=STEEP)], ids=str
)
def test_a_weight_on_two_devices_is_refused(
    spec: QuantSpec, op: str, generator: torch.Generator
) -> None:
    here = random_plain(spec, 70, 300, generator).pack().op_args()
    there = [t.to("meta") if isinstance(t, Tensor) else t for t in here]
    of, x = torch.ops.qkernels, torch.zeros(2, 300, device="meta")
    before, after = {
        "linear": ((x,), (None, "float", 0)),
        "linear_quant": (of.quantize_act(x, 32), (None, torch.float32)),
        "embedding": ((torch.zeros(3, dtype=torch.int64, device="meta"),), (torch.float32, 1.0)),
        "unpack": ((), ()),
        "dequantize": ((), (torch.float32,)),
    }[op]
    names = ("codes", "scale", "zero", "block_scale", "block_zero", "table")
    for i, which in enumerate(names[1:], start=1):
        if here[i] is not None:
            weight = [*there[:i], here[i], *there[i + 1 :]]
            with pytest.raises(RuntimeError, match=f"{which} is on cpu, but codes is on meta"):
                getattr(of, op)(*before, *weight, *after)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_opcheck(namespace: str, act: str, generator: torch.Generator) -> None:
    of = getattr(torch.ops, namespace)
    packed = random_plain(MIN, 70, 100, generator).pack()
    x = torch.randn(3, 100, requires_grad=act == "float")
    # With int8 the rounding counts as the identity in the gradient, but not in the value: nothing
    # to compare there.
    torch.library.opcheck(of.linear.default, (x, *packed.op_args(), torch.randn(70), act, 32))
    quant = of.quantize_act(x.detach(), 32)
    torch.library.opcheck(of.linear_quant.default, (*quant, *packed.op_args(), None, torch.float16))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient_to_x(backend: str, act: str, generator: torch.Generator) -> None:
    from qkernels import backends

    plain = random_plain(QuantSpec(4, 32, zero="integer", act_order=True), 70, 100, generator)
    packed = plain.pack()
    x = torch.randn(2, 3, 100, requires_grad=True)
    up = torch.randn(2, 3, 70, generator=generator)
    with backends.backend(backend):
        ops.linear(x, packed, act=act).backward(up)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, up @ plain.dequantize())
    with pytest.raises(RuntimeError, match="bias is fixed: only x and residual may"):
        ops.linear(x, packed, torch.zeros(70, requires_grad=True), act=act)


@pytest.mark.parametrize("act", ACTS)
def test_compiles(act: str, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 70, 100, generator).pack()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return ops.linear(x * 2, packed, act=act) + 1

    for m in (3, 5):
        x = torch.randn(m, 100, requires_grad=True)
        y = run(x)
        assert torch.equal(y, ops.linear(x * 2, packed, act=act) + 1)
        y.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
