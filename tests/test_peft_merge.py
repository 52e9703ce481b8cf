"""Merging adapters into packed layers: in the same format, at a cost that is told, and back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.convert import QuantWarning
from qkernels.nn import QuantLinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_models import codes, filled, logits, lora, same, tiny, train  # noqa: E402

import qkernels.peft as qpeft  # noqa: E402

SPECS = {
    "W8A16": "W8A16",
    "zero": qk.QuantSpec(4, 32, zero="integer"),
    "minimum": qk.QuantSpec(4, 32, zero="minimum"),
    "two-level": qk.QuantSpec(4, 32, scale="int8", zero="minimum"),
    "table": "MXFP4",
    "row": qk.QuantSpec(8, -1),
}


def expected(base: nn.Module, model: Any, name: str) -> torch.Tensor:
    """The dense weight of a layer with its adapter."""
    layer = model.base_model.model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return base.get_submodule(name).packed.dequantize() + layer.scaling["default"] * (b @ a)


@pytest.mark.parametrize("spec, safe", [*((spec, False) for spec in SPECS), ("W8A16", True)])
def test_merging_requantizes_in_the_same_format_and_says_the_error(spec: str, safe: bool) -> None:
    base = tiny(SPECS[spec])
    model = lora(copy.deepcopy(base))
    wanted = {
        n: expected(base, model, n).detach()
        for n, m in base.named_modules()
        if isinstance(m, QuantLinear)
    }
    with pytest.warns(QuantWarning, match=r"merge: 14 packed layers quantized again, relative"):
        merged = model.merge_and_unload(safe_merge=safe)
    assert not any("lora" in name for name, _ in merged.named_modules())
    report = qpeft.merge_report(merged)
    assert [layer.name for layer in report.layers] == list(wanted)
    lost = norm = 0.0
    for layer in report.layers:
        packed = merged.get_submodule(layer.name).packed
        old = base.get_submodule(layer.name).packed
        assert packed.spec == old.spec and layer.adapters == ("default",)
        exact = wanted[layer.name].double()
        off = (packed.dequantize().double() - exact).norm()
        assert layer.error == pytest.approx((off / exact.norm()).item(), rel=1e-5)
        change = exact - old.dequantize().double()
        moved = packed.dequantize().double() - old.dequantize().double()
        kept = (moved * change).sum() / change.square().sum()
        assert layer.kept == pytest.approx(kept.item(), rel=1e-4)
        lost, norm = lost + off.square().item(), norm + exact.square().sum().item()
        # As good as quantizing the sum itself: the very same thing.
        assert torch.equal(packed.codes, requantized(wanted[layer.name], old.spec).codes)
    assert report.error == pytest.approx((lost / norm) ** 0.5, rel=1e-5)
    assert f"{report.error:.2%}" in str(report) and str(report).count("\n") == 16
    assert set(report.to_dict()) == {"layers", "error", "change", "kept"}


def requantized(weight: torch.Tensor, spec: qk.QuantSpec) -> qk.PackedWeight:
    from qkernels.quant.quantize import quantize_packed

    return quantize_packed(weight, spec)


def test_a_change_that_rounding_takes_is_told_and_survives_in_more_bits() -> None:
    base = tiny("W4A16")
    model = filled(lora(copy.deepcopy(base)), scale=0.01)
    exact = logits(model)
    with pytest.warns(QuantWarning, match="Rounding took the rest: merge into more bits"):
        four = copy.deepcopy(model).merge_and_unload()
    assert qpeft.merge_report(four).kept < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it cost is returned, and small
        eight, report = qpeft.merge_and_unload(copy.deepcopy(model), "W8A16")
    assert report.kept > 0.9 and report.error < 0.01
    assert {m.spec.bits for m in eight.modules() if isinstance(m, QuantLinear)} == {8}
    before = (logits(base) - exact).abs().max()
    assert (logits(eight) - exact).abs().max() < before / 3
    for bad, said in (({"spec": "W9A16"}, "unknown scheme"), ({"algo": "best"}, "algo must be")):
        untouched = copy.deepcopy(model)
        with pytest.raises(ValueError, match=said):
            qpeft.merge_and_unload(untouched, **bad)
        assert torch.equal(logits(untouched), exact)


def test_unmerging_gives_the_same_bits_back() -> None:
    base = tiny()
    model = lora(copy.deepcopy(base))
    exact = logits(model)
    with pytest.warns(QuantWarning, match="merge: "):
        model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, exact) and not same(codes(model), codes(base))
    assert len(qpeft.merge_report(model).layers) == 14
    model.unmerge_adapter()
    assert same(codes(model), codes(base)) and torch.equal(logits(model), exact)
    assert not qpeft.merge_report(model).layers
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    # Disabling adapters unmerges them, as in PEFT.
    with pytest.warns(QuantWarning):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dora", [False, True])
def test_two_adapters_are_rounded_once(dora: bool) -> None:
    base = tiny()

    def both() -> Any:
        model = lora(copy.deepcopy(base), target_modules=["q_proj"], use_dora=dora)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_dora=dora
        )
        model.add_adapter("second", config)
        return filled(model.base_model.set_adapter(["default", "second"]) or model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together, in_turn = both(), both()
        together.merge_adapter()
        in_turn.merge_adapter(["default"])
        in_turn.merge_adapter(["second"])
    assert same(codes(together), codes(in_turn))
    names = [layer.adapters for layer in qpeft.merge_report(in_turn).layers]
    assert names == [("default", "second"), ("second",)] * 2
    in_turn.unmerge_adapter()
    assert same(codes(in_turn), codes(base))


def test_dora_merges_to_what_it_computes() -> None:
    model = lora(tiny("W8A16"), use_dora=True)
    train(model, 3)
    exact = logits(model)
    merged, report = qpeft.merge_and_unload(model)
    assert report.error < 0.01
    assert (logits(merged) - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_bias_of_the_adapter_is_merged_too() -> None:
    base = tiny("W8A16", attention_bias=True)
    model = lora(copy.deepcopy(base), target_modules=["q_proj"], lora_bias=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.bias + layer.lora_B["default"].bias * layer.scaling["default"]
    merged, _ = qpeft.merge_and_unload(model)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.bias, wanted)
    with pytest.warns(UserWarning, match="has no bias"):
        model = lora(tiny(), target_modules=["q_proj"], lora_bias=True)
    before = codes(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_adapter()
    assert same(codes(model), before)
    assert not any(getattr(m, "merged_adapters", None) for m in model.modules())


def test_values_that_are_not_finite_are_refused() -> None:
    model = lora(tiny(), target_modules=["v_proj"])
    before = codes(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight[3] = (
            torch.nan
        )
    with pytest.raises(ValueError, match=r"merge: the weight with default holds nan at row 3"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert same(codes(model), before)


def test_act_order_layers_keep_their_order() -> None:
    torch.manual_seed(2)
    spec = qk.QuantSpec(4, 32, zero="integer", act_order=True)
    from qkernels.quant.quantize import quantize_packed

    g_idx = torch.randperm(64).div(32, rounding_mode="floor").int()
    packed = quantize_packed(torch.randn(64, 64), spec, g_idx=g_idx)
    base = nn.Sequential(QuantLinear(packed))
    model = filled(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"])))
    x = torch.randn(3, 64)
    with torch.no_grad():
        exact = model(x)
    merged, report = qpeft.merge_and_unload(model)
    assert merged[0].spec == spec and torch.equal(merged[0].packed.unpack().g_idx, g_idx)
    with torch.no_grad():
        off = (merged(x) - exact).norm() / exact.norm()
    assert off < 2 * report.error


def test_conv1d_of_gpt2() -> None:
    """Packed it is [N, K], whatever fan_in_fan_out says of the dense ones beside it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        qk.quantize_(model, "W8A16", modules_to_not_convert=("lm_head", "c_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which the dense layers need
        model = lora(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    exact = logits(model)
    merged, report = qpeft.merge_and_unload(model)
    assert len(report.layers) == 2
    assert (logits(merged) - exact).abs().max() < 0.02 * exact.abs().max()
