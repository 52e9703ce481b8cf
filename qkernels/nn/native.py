"""Whether a program runs as one native call per step, and what it uses its matrices for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import backends
from ..quant import PackedWeight
from .program import Embed, Linear, Step

Weight = PackedWeight | torch.Tensor

# Ops of a step whose rows decide by the device alone.
STEP_OPS = (
    "norm",
    "add_norm",
    "norm_quant",
    "add_norm_quant",
    "gate",
    "gate_quant",
    "kv_append",
    "attention",
    "quantize_act",
)


@dataclass(frozen=True)
class WeightUse:
    """One use of a matrix. op: embedding, linear, or linear_quant, which takes int8 activations in
    groups of `act_group` columns."""

    name: str
    op: str
    weight: Weight
    act_group: int

    @property
    def case(self) -> dict[str, Any]:
        """What rows of the op decide by; of packed weights only."""
        assert isinstance(self.weight, PackedWeight)
        if self.op == "embedding":
            return {"weight": self.weight.kind}
        act = "int8" if self.act_group else "float"
        group = self.weight.group
        return {"weight": self.weight.kind, "act": act, "group": group, "act_group": self.act_group}


def uses_of(
    steps: Sequence[Step], weights: Mapping[str, Weight], act_group_of: Callable[[str], int]
) -> list[WeightUse]:
    """What a program does with its matrices, in its order. act_group_of: as in `lower`."""
    found = []
    for step in steps:
        if isinstance(step, Embed):
            op, group = "embedding", 0
        elif isinstance(step, Linear):
            group = act_group_of(step.weight)
            op = "linear_quant" if group else "linear"
        else:
            continue
        found.append(WeightUse(step.weight, op, weights[step.weight], group))
    return found


def refusal(uses: Iterable[WeightUse], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a program with these uses runs op by op and not as one native call per step; None if it
    does run natively. dtype: of its registers."""
    if device.type != "cpu":
        return f"the native step needs the CPU, the weights are on {device}"
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"activations are {name}, the native step takes float32"
    backend = backends.current()[0]
    if backend not in ("auto", "cpu"):
        return f"the backend in force is {backend!r}"
    for use in uses:
        if not isinstance(use.weight, PackedWeight):
            return f"{use.name} is dense ({use.weight.dtype})"
        if use.op == "embedding" and use.weight.perm is not None:
            return f"{use.name}, the table, has its columns in act-order"
        choice = backends.choose(use.op, "cpu", use.case)
        if choice.row.name != "cpu":
            why = "; ".join(reason for _, reason in choice.reasons)
            return f"{use.name}: {why or f'the row {choice.row.name!r} computes it'}"
    for op in STEP_OPS:
        row = backends.choose(op, "cpu", {}).row
        if row.name != "cpu":
            return f"the row {row.name!r} computes {op}"
    return None
