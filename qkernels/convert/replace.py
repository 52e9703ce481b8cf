"""Modules into their packed replacements and back, and what a model holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..nn.embedding import QuantEmbedding
from ..nn.keep import HoldsPacked
from ..nn.linear import QuantLinear
from ..quant import PackedWeight
from .plan import Target, scaled_embedding
from .report import DenseTensor


@dataclass(frozen=True)
class Census:
    """params: of a model, packed weights by their logical size, tied ones once. nbytes: of all its
    parameters and buffers."""

    params: int
    nbytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Census:
        packed = {id(m.weight): m for m in model.modules() if isinstance(m, HoldsPacked)}
        params = sum(
            packed[id(p)]._n * packed[id(p)]._k if id(p) in packed else p.numel()
            for p in model.parameters()
        )
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return cls(params, sum(t.nbytes for t in tensors.values()))


def dense_tensors(model: nn.Module) -> list[DenseTensor]:
    """The parameters that are not packed, largest first."""
    packed = {id(m.weight) for m in model.modules() if isinstance(m, HoldsPacked)}
    found, seen = [], set(packed)
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            what = ""
            if isinstance(module, nn.Embedding):
                what = "a table: see embeddings="
            elif p.dim() == 3 and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                what = f"{p.shape[0]} matrices in one parameter, used by {type(module).__name__}"
            full = f"{path}.{name}".lstrip(".")
            found.append(DenseTensor(full, tuple(p.shape), p.numel(), p.nbytes, what))
    return sorted(found, key=lambda d: -d.params)


def quantized_only(model: nn.Module, targets: Iterable[Target]) -> set[int]:
    """ids of the float weights that nothing holds any more once the targets are replaced."""
    replaced = {id(t.module): id(t.module.weight) for t in targets}
    stays = {
        id(p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and not (id(module) in replaced and name == "weight")
    }
    return set(replaced.values()) - stays


def replacement(
    target: Target, packed: PackedWeight, values: Mapping[int, torch.Tensor]
) -> HoldsPacked:
    """The packed module for a target. values: of tensors that are on meta, or move."""
    module, dtype = target.module, target.weight.dtype
    new: HoldsPacked
    if target.kind == "embedding":
        assert isinstance(module, nn.Embedding)
        scale, rounded = scaled_embedding(module) or (1.0, False)
        new = QuantEmbedding(
            packed,
            dtype=dtype,
            padding_idx=module.padding_idx,
            multiplier=scale,
            round_multiplier=rounded,
        )
    else:
        bias = module._parameters.get("bias")
        value = None if bias is None else values.get(id(bias), bias.detach())
        new = QuantLinear(packed, value, target.choice.act, dtype=dtype)
    new._replaces(skeleton(module, values))
    return new


def skeleton(module: nn.Module, values: Mapping[int, torch.Tensor]) -> nn.Module:
    """The module without its values: what `dequantize_` fills again."""
    empty = copy.copy(module)
    empty.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    empty.__dict__["_buffers"] = {
        name: None if b is None else values.get(id(b), b) for name, b in module._buffers.items()
    }
    return empty


def commit(
    model: nn.Module, new: Mapping[int, nn.Module], values: Mapping[int, torch.Tensor]
) -> None:
    """Puts modules (by the id of what they replace) and values (by id) into the model. Nothing in
    here can fail half way."""
    parameters: dict[int, nn.Parameter] = {}
    for module in [*model.modules()]:
        for name, p in module._parameters.items():
            if p is None or id(p) not in values:
                continue
            if p.is_meta:
                made = parameters.setdefault(id(p), nn.Parameter(values[id(p)], p.requires_grad))
                module._parameters[name] = made
            else:
                p.data = values[id(p)]
        for name, b in module._buffers.items():
            if b is not None and id(b) in values:
                module._buffers[name] = values[id(b)]
    for module in [*model.modules()]:
        for name, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[name] = new[id(child)]
