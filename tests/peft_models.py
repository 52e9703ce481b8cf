"""Tiny packed models with adapters, for the tests of PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
import transformers
from torch import nn

import qkernels as qk
import qkernels.peft
from qkernels.convert import QuantWarning
from qkernels.nn import QuantLinear

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
