"""Gates."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .act import quantize_act


def _gate(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """float32 [M, K], whatever the type of gate."""
    x = gate.float()
    match activation:
        case "silu":
            y = functional.silu(x)
        case "gelu_tanh":
            y = functional.gelu(x, approximate="tanh")
        case "gelu_erf":
            y = functional.gelu(x)
        case _:
            y = functional.relu(x)
    return y if up is None else y * up.float()


def gate(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """gate, up [M, K] -> activation(gate) * up, [M, K] of gate's dtype."""
    return _gate(gate, up, activation).to(gate.dtype)


def gate_quant(gate: Tensor, up: Tensor | None, activation: str, act_group: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scale, sums of the same in float32."""
    return quantize_act(_gate(gate, up, activation), act_group)
