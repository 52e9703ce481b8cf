"""QuantLinear and QuantEmbedding as modules: everything that PyTorch does to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.nn import QuantEmbedding, QuantLinear
from qkernels.nn.keep import HoldsPacked
from qkernels.quant import E2M1, PackedWeight, QuantSpec, quantize_packed

SPECS = [
    QuantSpec(4, 32),
    QuantSpec(8, -1),
    QuantSpec(4, 16, zero="integer"),
    QuantSpec(4, 32, "int8", "minimum"),
    QuantSpec(4, 32, "e8m0", table=E2M1),
    QuantSpec(4, 32, "bfloat16", "minimum"),
]
N, K = 70, 96


def make(spec: QuantSpec = SPECS[0], bias: bool = True, act: str = "float") -> QuantLinear:
    torch.manual_seed(3)
    layer = nn.Linear(K, N, bias=bias)
    return QuantLinear(
        quantize_packed(layer.weight, spec), layer.bias if bias else None, act, dtype=torch.float32
    )


def same(a: HoldsPacked, b: HoldsPacked) -> None:
    left, right = a.packed.tensors(), b.packed.tensors()
    assert left.keys() == right.keys() and a.spec == b.spec
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trip(spec: QuantSpec) -> None:
    layer, x = make(spec), torch.randn(3, K)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(PackedWeight.empty(spec, N, K), torch.zeros(N), "float")
    for tensor in (*other.buffers(), other.weight):
        tensor.view(torch.uint8).zero_()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    same(layer, other)
    assert torch.equal(layer(x), other(x))
    meta = QuantLinear(PackedWeight.empty(spec, N, K, "meta"), torch.zeros(N), "float")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(layer(x), meta(x))


def test_state_dicts_that_do_not_fit_are_refused_by_name() -> None:
    model = nn.Sequential(make(QuantSpec(8, -1)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = QuantLinear.from_linear(nn.Linear(64, 64), QuantSpec(8, -1))
    for state, target, said in (
        # Shaped like the codes: a plain copy would turn floats into codes without a word.
        (nn.Linear(64, 64).state_dict(), whole, r"weight must be torch.int8 \[64, 64\], got torch"),
        (
            {"0." + k: v for k, v in make(QuantSpec(8, -1, zero="integer")).state_dict().items()},
            model,
            r"0: W8 row float16 \[70, 96\]: it has no zero",
        ),
        (
            {"0." + k: v for k, v in make(QuantSpec(4, 32)).state_dict().items()},
            model,
            r"weight must be torch.int8 \[128, 96\], got torch.int8 \[128, 48\]",
        ),
        (
            {**before, "0.scale": before["0.scale"].bfloat16()},
            model,
            r"scale must be torch.float16 .*, got torch.bfloat16",
        ),
    ):
        with pytest.raises(RuntimeError, match=said):
            target.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.scale"):
        model.load_state_dict({k: v for k, v in before.items() if k != "0.scale"})
    with pytest.raises(ValueError, match=r"0\.scale has values that are not finite"):
        model.load_state_dict({**before, "0.scale": before["0.scale"] * torch.inf})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_copies(spec: QuantSpec) -> None:
    layer, x = make(spec), torch.randn(2, 3, K)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
        "share_memory": copy.deepcopy(layer).share_memory(),
    }
    for how, other in copies.items():
        same(layer, other)
        assert torch.equal(other(x), layer(x)), how
        assert other.act == layer.act and other.float_dtype == torch.float32
    assert copies["share_memory"].weight.is_shared() and copies["share_memory"].scale.is_shared()
    copies["deepcopy"].weight.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_types_stay_and_the_output_follows_x(spec: QuantSpec) -> None:
    layer, x = make(spec), torch.randn(3, K)
    before = copy.deepcopy(layer)
    for change in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float(),
    ):
        change(layer)
        same(layer, before)
        assert torch.equal(layer.bias, before.bias) and layer.bias.dtype == torch.float32
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert layer(x.to(dtype)).dtype == dtype
    assert layer.float_dtype == torch.float32
    assert layer.half().float_dtype == torch.float16


def test_to_device() -> None:
    layer = make(QuantSpec(4, 32, "int8", "minimum")).to("meta")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer(torch.randn(5, K, device="meta")).shape == (5, N)
    assert layer.packed.block_scale.dtype == torch.float16


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_dequantized_self(spec: QuantSpec, bias: bool) -> None:
    layer = make(spec, bias)
    dense = layer.dequantize()
    assert type(dense) is nn.Linear and dense.weight.requires_grad
    assert dense.weight.dtype == torch.float32 and (dense.bias is not None) == bias
    wide = torch.randn(12, 3 * K)
    inputs = [
        torch.randn(K),
        torch.randn(1, K),
        torch.randn(2, 3, 4, K),
        torch.zeros(0, K),
        torch.zeros(2, 0, K),
        wide[::2, K : 2 * K],
        torch.randn(K, 5).t(),
        torch.randn(4, K, 6).transpose(1, 2),
    ]
    for x in inputs:
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_reaches_the_input(spec: QuantSpec) -> None:
    layer = make(spec)
    dense = layer.dequantize()
    x = torch.randn(2, 3, K, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    up = torch.randn(2, 3, N)
    layer(x).backward(up)
    dense(z).backward(up)
    torch.testing.assert_close(x.grad, z.grad)
    assert layer.weight.grad is None and layer.bias.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.detach()))
    assert not layer(x.detach()).requires_grad


def test_under_autocast() -> None:
    """The types that come out are those of nn.Linear."""
    layer, dense = make(), nn.Linear(K, N)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for x in (torch.randn(2, K), torch.randn(2, K, dtype=torch.bfloat16)):
                y = layer(x)
                assert y.dtype == dense(x).dtype == dtype
                assert torch.equal(y, make()(x.to(dtype)))


@pytest.mark.parametrize("act", ["float", "int8"])
def test_compile_and_export(act: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = make(act=act), QuantLinear.from_linear(nn.Linear(N, 5), act=act)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Two().eval(), torch.randn(4, K)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (4, 1, 9, 2):
        y = torch.randn(m, K)
        assert torch.equal(compiled(y), model(y))
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = x.clone().requires_grad_()
    graph(z).sum().backward()
    z2 = x.clone().requires_grad_()
    model(z2).sum().backward()
    torch.testing.assert_close(z.grad, z2.grad)
    for strict in (True, False):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            model, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict
        ).module()
        assert torch.equal(program(x), expected)
        assert torch.equal(program(x[:2]), model(x[:2]))


def test_from_linear() -> None:
    dense = nn.Linear(100, 40).bfloat16().eval()
    layer = QuantLinear.from_linear(dense, "W8A8", group_size=64)
    assert layer.act == "int8" and not layer.training and layer.bias.dtype == torch.float32
    assert layer.spec.group_size == 64  # 100 is no multiple of 16: the last group is shorter
    assert (
        QuantLinear.from_linear(nn.Linear(576, 40), "W4A16", group_size=128).spec.group_size == 96
    )
    back = layer.dequantize()
    assert back.weight.dtype == torch.bfloat16 and torch.equal(back.bias, dense.bias)
    assert not back.training
    assert layer.dequantize(torch.float32).weight.dtype == torch.float32
    for bad, said in (
        (nn.Conv1d(3, 3, 1), "got Conv1d"),
        (layer, "got QuantLinear"),
        (nn.Embedding(4, 16), "got Embedding"),
    ):
        with pytest.raises(TypeError, match=said):
            QuantLinear.from_linear(bad)
    with pytest.raises(ValueError, match="algo must be one of"):
        QuantLinear.from_linear(dense, algo="gptq")


def test_activations_of_another_type_are_named() -> None:
    """Some modules cast x to weight.dtype first, which is int8 here: better an error than codes."""
    layer = make()
    for dtype in (torch.int8, torch.float64):
        with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got"):
            layer(torch.zeros(2, K, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"x must be \[M, 96\], got \[2, 95\]"):
        layer(torch.zeros(2, K - 1))


def test_embedding_as_a_module() -> None:
    table = nn.Embedding(50, 64, padding_idx=3).half()
    layer = QuantEmbedding(
        quantize_packed(table.weight, QuantSpec(8, -1)), dtype=torch.float16, padding_idx=3
    )
    ids = torch.tensor([[1, 2], [49, 3]])
    dense = layer.dequantize()
    assert isinstance(dense, nn.Embedding) and dense.padding_idx == 3
    assert dense.weight.dtype == torch.float16
    for form in (ids, ids.int(), ids.t(), ids[:, 0], torch.zeros(0, 2, dtype=torch.int64)):
        assert torch.equal(layer(form), dense(form)) and layer(form).dtype == torch.float16
    assert not layer(ids)[1, 1].any()  # the row of the padding stays zero
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(ids), layer(ids))
    assert layer.bfloat16()(ids).dtype == torch.bfloat16
    assert layer.float()(ids).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), layer(ids))
    program = torch.export.export(layer, (ids,)).module()
    assert torch.equal(program(ids), layer(ids))
    fixed = QuantEmbedding(layer.packed)  # a decoder's: float32 whatever happens
    assert fixed.half()(ids).dtype == torch.float32


def test_info_of_a_plain_model() -> None:
    model = nn.ModuleDict({"a": make(), "b": QuantEmbedding(make().packed)})
    names = [layer.name for layer in qk.info(model).layers]
    assert names == ["a", "b"]


def test_forward_mode_derivatives_are_not_lost() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 64), "W8A16")
    x, tangent = torch.randn(2, 64), torch.randn(2, 64)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivative"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, tangent))
