"""The gate of an MLP: an activation, times `up` where there is one. No backward: asking for a gradient raises."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..backends import select
from . import checks
from .act import QuantAct, new_quant_act
from .registry import define, no_backward

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu")


def _check(op: str, gate: Tensor, up: Tensor | None, activation: str, act_group: int | None) -> None:
    checks.float_type(op, "gate", gate.dtype)
    checks.rows(op, "gate", gate)
    if gate.shape[1] < 1:
        checks.fail(op, f"gate needs at least one column, got {list(gate.shape)}")
    if up is not None:
        if up.dtype != gate.dtype:
            names = checks.type_name(gate.dtype), checks.type_name(up.dtype)
            checks.fail(op, f"up must be {names[0]} like gate, got {names[1]}")
        checks.rows(op, "up", up)
        if up.shape != gate.shape:
            checks.fail(op, f"up must be {list(gate.shape)} like gate, got {list(up.shape)}")
    if activation not in ACTIVATIONS:
        checks.fail(op, f'activation must be silu, gelu_tanh, gelu_erf or relu, got "{activation}"')
    if act_group is not None:
        checks.act_group(op, act_group)
    checks.same_device(op, "gate", gate.device, up=up)


def check_gate(gate: Tensor, up: Tensor | None, activation: str) -> None:
    _check("gate", gate, up, activation, None)


def check_gate_quant(gate: Tensor, up: Tensor | None, activation: str, act_group: int) -> None:
    _check("gate_quant", gate, up, activation, act_group)


def _gate_fake(*args: Any) -> Tensor:
    check_gate(*args)
    return args[0].new_empty(args[0].shape)


def _gate_quant_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_gate_quant(*args)
    return new_quant_act(args[0], args[-1])


define(
    "gate",
    "(Tensor gate, Tensor? up, str activation) -> Tensor",
    fake=_gate_fake,
    reference=checks.checked(check_gate, reference.gate),
    backward=no_backward("gate"),
)
define(
    "gate_quant",
    "(Tensor gate, Tensor? up, str activation, int act_group) -> (Tensor, Tensor, Tensor)",
    fake=_gate_quant_fake,
    reference=checks.checked(check_gate_quant, reference.gate_quant),
)


def gate(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """activation(gate) * up, computed in float32 and rounded once.

    gate, up [M, K] float32, float16 or bfloat16, of one dtype, rows dense; activation: one of ACTIVATIONS
    (gelu_tanh is the tanh approximation, gelu_erf the exact one) -> [M, K] of gate's dtype. Raises RuntimeError for
    another shape, dtype, stride or activation, and for a gradient.
    """
    return select("gate", gate.device)(gate, up, activation)


def gate_quant(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, act_group: int) -> QuantAct:
    """quantize_act(gate(gate.float(), up.float(), ...), act_group), bitwise, without the tensor in between.

    act_group: columns per scale, a multiple of 16. The rest is as in `gate`.
    """
    return QuantAct(*select("gate_quant", gate.device)(gate, up, activation, act_group))
