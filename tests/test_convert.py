"""quantize_ and dequantize_ on models of plain PyTorch."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.convert import QuantReport, QuantWarning
from qkernels.nn import QuantEmbedding, QuantLinear
from qkernels.nn.keep import HoldsPacked
from qkernels.quant import QuantSpec


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(
        self, vocab: int = 50, width: int = 64, inner: int = 96, tied: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3, 49], [7, 0, 0, 20]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def quietly(model: nn.Module, *args, **kwargs) -> QuantReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        return qk.quantize_(model, *args, **kwargs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert not any(isinstance(m, HoldsPacked) for m in model.modules())
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "spec", ["W4A16", "W8A8", "W6A16", "w2a16", "MXFP4", QuantSpec(4, 16, zero="minimum")], ids=str
)
def test_replaces_linear_layers(spec: str | QuantSpec) -> None:
    model = Net()
    report = quietly(model, spec)
    assert [layer.names for layer in report.layers] == [
        (f"layers.{i}.{name}",) for i in range(2) for name in ("up", "down")
    ]
    assert all(type(model.get_submodule(layer.names[0])) is QuantLinear for layer in report.layers)
    assert model.lm_head.weight is model.embed.weight and type(model.lm_head) is nn.Linear
    assert [s.name for s in report.skipped] == ["lm_head"]
    act = "int8" if spec == "W8A8" else "auto" if isinstance(spec, QuantSpec) else "float"
    assert {layer.act for layer in report.layers} == {act}
    dense = copy.deepcopy(model)
    qk.dequantize_(dense)
    tolerance = 0.1 if act != "float" else 1e-4
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=tolerance, atol=tolerance)


def test_the_report_counts_parameters() -> None:
    model = Net(tied=False)
    exact = model.layers[0].up.weight.detach().clone()
    before = sum(t.nbytes for t in model.parameters())
    params = sum(t.numel() for t in model.parameters())
    with pytest.warns(QuantWarning, match=r"22% of the .* stay dense\. The largest: embed\.w"):
        report = qk.quantize_(model, "W4A16")
    packed = 4 * 64 * 96
    assert report.params == params and report.params_quantized == packed
    assert report.share == packed / params
    assert report.nbytes_before == before
    assert report.nbytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert report.linear_nbytes_before == 4 * packed
    assert report.linear_nbytes == sum(layer.nbytes for layer in report.layers)
    assert report.bits_per_weight == 8 * report.linear_nbytes / packed
    up = report.layers[0]
    shown = model.layers[0].up.packed.dequantize()
    assert up.error == pytest.approx(float((shown - exact).norm() / exact.norm()), rel=1e-5)
    assert report.error == max(layer.error for layer in report.layers)
    text = str(report)
    for part in (
        "whole model",
        "linear layers",
        "layers.0.up",
        "lm_head",
        "W4 g32",
        "embed.weight",
    ):
        assert part in text
    assert report.to_dict()["layers"][0]["names"] == ("layers.0.up",)
    assert [d.name for d in report.dense[:2]] == ["embed.weight", "lm_head.weight"]


def test_nothing_dense_is_no_warning() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qk.quantize_(model).share > 0.99


def test_group_sizes_fall_back() -> None:
    def group(k: int, spec: str | QuantSpec, size: int | None = None) -> tuple[int, str]:
        model = nn.Sequential(nn.Linear(k, 64))
        layer = quietly(model, spec, group_size=size).layers[0]
        torch.testing.assert_close(
            model(torch.eye(k)) - model[0].bias,
            model[0].packed.dequantize().T,
            rtol=1e-4,
            atol=1e-5,
        )
        return model[0].spec.group_size, layer.note

    assert group(576, "W4A16", 64) == (64, "")
    assert group(576, "W4A16", 128) == (96, "group size 96: 128 does not divide 576")
    assert group(48, "W4A16", 64) == (48, "group size 48: 64 does not divide 48")
    assert group(48, "W4A16") == (16, "group size 16: 32 does not divide 48")
    assert group(100, "W4A16") == (32, "no group size divides 100: the last group has 4 columns")
    assert group(576, "W8A16", -1) == (-1, "")
    assert group(576, "W8A16") == (32, "")
    # With two levels a group must divide 256 too.
    assert group(576, QuantSpec(4, 128, "int8")) == (64, "group size 64: 128 does not divide 576")


def test_overrides_and_names() -> None:
    model = Net(tied=False)
    report = quietly(
        model,
        "W4A16",
        overrides={
            r"layers\.0\.up": None,
            r"\.up$": "W8A8",
            r"lm_head": QuantSpec(4, 64, zero="integer"),
        },
        modules_to_not_convert=["layers.1.down", "lm_head"],
    )
    kinds = {layer.names[0]: (layer.spec, layer.act) for layer in report.layers}
    assert kinds == {
        "layers.0.down": ("W4 g32 float16", "float"),
        "layers.1.up": ("W8 g32 float16", "int8"),
        "lm_head": ("W4 g64 float16 zero", "auto"),
    }
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons["layers.0.up"] == r"override 'layers\\.0\\.up'"
    assert reasons["layers.1.down"] == "modules_to_not_convert names 'layers.1.down'"


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"overrides": {"layers.9": None}}, ValueError, r"override 'layers\.9' matches no layer"),
        ({"overrides": {"embed": "W8A16"}}, ValueError, "embed is no .* embedding without embeddi"),
        ({"overrides": {"nowhere": "W8A16"}}, ValueError, "'nowhere' matches no layer"),
        ({"overrides": {"up|down": "W8A16", "up": None}}, ValueError, "an earlier override"),
        ({"overrides": {"(": "W8A16"}}, ValueError, r"override '\(': "),
        ({"overrides": {"up": "W9A16"}}, ValueError, "override 'up': unknown scheme 'W9A16'"),
        ({"modules_to_not_convert": ["head"]}, ValueError, "names 'head', which is no module"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "a list of names"),
        ({"spec": "W7A16"}, ValueError, "spec: unknown scheme 'W7A16'"),
        ({"spec": 4}, TypeError, "spec must be a scheme like 'W4A16' or a QuantSpec, got 4"),
        ({"group_size": 24}, ValueError, "group_size must be a positive multiple of 16"),
        ({"spec": QuantSpec(4, 32), "group_size": 64}, ValueError, "groups of 32, and group_size"),
        ({"spec": QuantSpec(4, 32, act_order=True)}, ValueError, "comes with checkpoints"),
        ({"embeddings": "W1A16"}, ValueError, "embeddings: unknown scheme"),
        ({"act": "int4"}, ValueError, "act must be auto, int8 or float"),
        ({"algo": "gptq"}, ValueError, "algo must be one of"),
        ({"weights": 3}, TypeError, "weights must be a mapping"),
        ({"spec": "MXFP4", "algo": "hqq"}, ValueError, "powers of two"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(arguments: dict, error: type, said: str) -> None:
    model = Net()
    before = state(model)
    with pytest.raises(error, match=said):
        qk.quantize_(model, **arguments)
    unchanged(model, before)
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        qk.quantize_(3)
    with pytest.raises(ValueError, match=r"itself a Linear.*from_linear"):
        qk.quantize_(nn.Linear(16, 16))


def test_all_or_nothing() -> None:
    model = Net()
    with torch.no_grad():
        model.layers[1].down.weight[5, 7] = torch.nan
    before = state(model)
    before["layers.1.down.weight"][5, 7] = 0
    with pytest.raises(ValueError, match=r"layers\.1\.down\.weight holds nan at row 5, column 7"):
        qk.quantize_(model)
    with torch.no_grad():
        model.layers[1].down.weight[5, 7] = 0
    unchanged(model, before)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what == "layers.1.up":
            raise Stop

    with pytest.raises(Stop):
        qk.quantize_(model, progress=stop)
    unchanged(model, before)


def test_progress_is_called_per_layer() -> None:
    calls: list[tuple[int, int, str]] = []
    quietly(Net(), progress=lambda *call: calls.append(call))
    total = 4 * 64 * 96
    assert calls == [
        (total * (i + 1) // 4, total, f"layers.{i // 2}.{name}")
        for i, name in enumerate(["up", "down", "up", "down"])
    ]


def test_twice_leaves_what_is_quantized() -> None:
    model = Net(tied=False)
    first = quietly(model)
    codes = model.layers[0].up.weight
    again = quietly(model, "W8A16", modules_to_not_convert=())
    assert model.layers[0].up.weight is codes
    assert [layer.names for layer in again.layers] == [("lm_head",)]
    assert [s.reason for s in again.skipped] == ["quantized already"] * 4
    assert again.params == first.params
    assert again.params_quantized == first.params_quantized + 50 * 64


@pytest.mark.parametrize("training", [True, False])
def test_dequantize_undoes_it(training: bool) -> None:
    model = Net().bfloat16().train(training)
    model.layers[0].up.weight.requires_grad_(False)
    seen: list[str] = []
    handle = model.layers[1].up.register_forward_hook(lambda *_: seen.append("hook"))
    before = copy.deepcopy(model)
    quietly(model, "W8A16", embeddings="W8A16")
    model(IDS)
    assert seen == ["hook"]  # hooks of the layer work on
    assert model.lm_head.weight is model.embed.weight
    assert qk.dequantize_(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in before.named_modules()
    ]
    assert model.lm_head.weight is model.embed.weight and model.embed.padding_idx == 0
    for (name, p), (other, q) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert (name, p.dtype, p.shape, p.requires_grad) == (
            other,
            q.dtype,
            q.shape,
            q.requires_grad,
        )
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)
    assert torch.equal(model.layers[0].up.bias, before.layers[0].up.bias)
    assert all(m.training == training for m in model.modules())
    model(IDS)
    assert seen == ["hook"] * 2
    handle.remove()
    model(IDS)
    assert seen == ["hook"] * 2


def test_dequantize_types_and_refusals() -> None:
    model = Net(tied=False)
    quietly(model)
    model.half()
    assert qk.dequantize_(copy.deepcopy(model)).layers[0].up.weight.dtype == torch.float16
    assert qk.dequantize_(model, torch.float32).layers[0].up.weight.dtype == torch.float32
    with pytest.raises(TypeError, match=r"must be a float type, got torch\.int8"):
        qk.dequantize_(model, torch.int8)
    with pytest.raises(ValueError, match=r"use its dequantize\(\)"):
        qk.dequantize_(QuantLinear.from_linear(nn.Linear(16, 16)))
    quietly(model)
    with pytest.raises(ValueError, match=r"layers\.0\.up\.weight is on meta"):
        qk.dequantize_(model.to("meta"))


def test_one_module_at_two_places() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = quietly(model)
    assert model["a"] is model["b"][0] and isinstance(model["a"], QuantLinear)
    assert len(report.layers) == 1 and report.layers[0].names == ("a", "b.0")
    assert report.params_quantized == 64 * 64
    qk.dequantize_(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


def test_two_layers_with_one_weight() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    report = quietly(model)
    assert model["a"].weight is model["b"].weight and model["a"].scale is model["b"].scale
    assert model["a"].bias is not model["b"].bias
    assert len(report.layers) == 1 and report.params_quantized == 64 * 64
    assert report.nbytes == report.layers[0].nbytes + 2 * 64 * 4


def tied_as_one(model: Net) -> None:
    for name, tensor in model.embed.packed.tensors().items():
        other = model.lm_head.packed.tensors()[name]
        assert tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr(), name
    assert model.lm_head.weight is model.embed.weight and model.lm_head.scale is model.embed.scale


@pytest.mark.parametrize("spec", ["W8A16", "MXFP4"])
def test_a_head_tied_to_a_quantized_table(spec: str) -> None:
    model = Net()
    params = sum(p.numel() for p in model.parameters())
    report = quietly(model, "W4A16", embeddings=spec)
    assert isinstance(model.embed, QuantEmbedding) and isinstance(model.lm_head, QuantLinear)
    tied_as_one(model)
    assert report.layers[0].names == ("embed", "lm_head")
    assert "lm_head is tied to embed and quantized as it is" in str(report)
    assert report.params == params and report.params_quantized == 4 * 64 * 96 + 50 * 64
    stored = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert report.nbytes == sum(stored.values())
    for other in (
        copy.deepcopy(model), model.half(), model.float(), model.to("cpu"), model.share_memory()
    ):  # fmt: skip
        tied_as_one(other)
    assert model.to("meta").lm_head.scale is model.embed.scale


def test_half_of_a_tied_pair() -> None:
    model = Net()
    report = quietly(model, modules_to_not_convert=())
    assert isinstance(model.lm_head, QuantLinear) and type(model.embed) is nn.Embedding
    assert "lm_head was tied to embed.weight, which stays dense" in str(report)
    model = Net()
    table = model.embed.weight
    report = quietly(model, embeddings="W8A16", overrides={"lm_head": None})
    assert isinstance(model.embed, QuantEmbedding) and model.lm_head.weight is table
    assert "embed was tied to lm_head.weight, which stays dense" in str(report)
    model = Net()
    report = quietly(model, embeddings="W8A16", overrides={"lm_head": "W4A16"})
    assert model.embed.spec.bits == 8 and model.lm_head.spec.bits == 4
    assert re.search("lm_head was tied to embed; in two formats", str(report))


def test_weights_that_are_read_directly_are_left() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(layer, 2), "proj": nn.Linear(64, 64)}
    ).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = model["encoder"](x)
    report = quietly(model)
    reasons = {s.name: s.reason for s in report.skipped}
    for i in range(2):
        at = f"encoder.layers.{i}"
        assert reasons[f"{at}.self_attn.out_proj"] == (
            "its weight is read directly, by nn.MultiheadAttention"
        )
        for name in ("linear1", "linear2"):
            assert reasons[f"{at}.{name}"] == (
                "its weight is read directly, by nn.TransformerEncoderLayer"
            )
    assert [layer.names for layer in report.layers] == [("proj",)]
    with torch.no_grad():
        assert torch.equal(model["encoder"](x), before)
    decoder = nn.TransformerDecoderLayer(64, 4, 96, batch_first=True).eval()
    assert {n for layer in quietly(decoder).layers for n in layer.names} == {"linear1", "linear2"}
    decoder(x, x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 64, 96))


def test_other_modules_are_left_and_reported() -> None:
    wrapped = nn.Linear(32, 32)
    nn.utils.parametrizations.weight_norm(wrapped)
    patched = nn.Linear(32, 32)
    patched.forward = lambda x: x
    renorm = nn.Embedding(8, 32, max_norm=1.0)
    model = nn.ModuleDict(
        {
            "scaled": Scaled(32, 32),
            "named": Named(32, 32),
            "wrapped": wrapped,
            "patched": patched,
            "float64": nn.Linear(32, 32).double(),
            "empty": nn.Linear(0, 32),
            "renorm": renorm,
            "experts": Experts(),
        }
    )
    with pytest.warns(QuantWarning, match=r"experts\.gate_up \[4, 64, 96\] .*4 matrices in one"):
        report = qk.quantize_(model, embeddings="W8A16")
    assert [layer.names for layer in report.layers] == [("named",)]
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons == {
        "scaled": "it has a forward of its own",
        "wrapped": "its weight is not a parameter of its own (a parametrization, or none)",
        "patched": "its forward was replaced on the instance, as device_map does: quantize before",
        "float64": "its weight is float64",
        "empty": "its weight is [32, 0]",
        "renorm": "it rescales its rows (max_norm)",
    }
    assert report.dense[0].name == "experts.gate_up" and "Experts" in report.dense[0].what
    qk.dequantize_(model)
    assert type(model["named"]) is Named


def test_info_counts_a_tied_weight_once() -> None:
    model = Net()
    quietly(model, embeddings="W8A16")
    info = qk.info(model)
    layers = {layer.name: layer for layer in info.layers}
    assert layers["embed"].op == "embedding" and layers["lm_head"].op == "linear"
    once = sum(layer.nbytes for name, layer in layers.items() if name != "lm_head")
    assert info.nbytes == once


@pytest.mark.parametrize("algo", ["auto", "rtn", "hqq"])
def test_algorithms(algo: str) -> None:
    model = Net()
    report = quietly(model, algo=algo)
    assert {layer.algo for layer in report.layers} == {"hqq" if algo == "hqq" else "rtn"}
    assert report.error < 0.12
