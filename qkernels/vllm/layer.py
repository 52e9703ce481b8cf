"""A layer of vLLM that holds a packed weight: where its tensors lie, and how it computes.

The tensors take the names that the checkpoint's had, as parameters: vLLM moves, offloads and
compiles parameters, and its LoRA layers look for `qweight`, `weight_packed` or `weight`. Nothing
here imports vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops.linear import apply, default_act_group, resolve_act
from ..quant import PackedWeight
from ..quant.weight import WeightKind

OPTION = "qkernels_act"
ACTS = ("auto", "int8", "float")
# Of this process: layers that hold a packed weight, by what they are ("W4 g32 float16, act=int8").
held: Counter[str] = Counter()


class Names(NamedTuple):
    """Of a layer's parameters: codes, scale, zero, and where its columns come from."""

    codes: str
    scale: str
    zero: str
    columns: str = "g_idx"


class Constants(NamedTuple):
    """What a call needs beside tensors."""

    names: Names
    kind: WeightKind
    group: int
    n: int
    k: int
    act: str
    act_group: int


def act_option(given: Any) -> str:
    """What the option qkernels_act of vLLM's `additional_config` says; "auto" if it says nothing.
    Raises ValueError for another value than auto, int8 and float."""
    act = given.get(OPTION, "auto") if isinstance(given, Mapping) else "auto"
    if act not in ACTS:
        raise ValueError(f"{OPTION} must be one of {', '.join(ACTS)}, got {act!r}")
    return act


def hold(
    layer: nn.Module,
    names: Names,
    weight: PackedWeight,
    act: str = "auto",
    columns: Tensor | None = None,
) -> None:
    """Puts a packed weight in the place of the tensors that a layer has loaded.

    weight: on the layer's device. act: "int8" quantizes activations at run time, "float" does not,
    "auto" is int8 on a CPU. columns [weight.k] int64: of x, for those of the weight; None takes
    the weight's own order.
    """
    spec = weight.spec
    if spec.two_level or spec.table is not None or spec.zero == "minimum":
        raise ValueError(f"qkernels: {spec} has tensors beside codes, scales and zero points")
    columns = weight.perm if columns is None else columns.to(weight.device)
    for name in names:
        layer._parameters.pop(name, None)
        layer.__dict__.pop(name, None)
    for name, tensor in zip(names, (weight.codes, weight.scale, weight.zero, columns), strict=True):
        parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, parameter)
    chosen = resolve_act(act, weight.device)
    holder: Any = layer
    holder.qkernels = Constants(
        names, weight.kind, weight.group, weight.n, weight.k, chosen, default_act_group(weight)
    )
    held[f"{weight.kind}, act={chosen}"] += 1


def compute(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] float32, float16 or bfloat16 -> [..., N] of its type. bias: [N] float or None."""
    constants: Any = layer.qkernels
    names, kind, group, n, k, act, act_group = constants
    args = (
        getattr(layer, names.codes), getattr(layer, names.scale), getattr(layer, names.zero),
        None, None, None, kind.bits, group, n, k,
    )  # fmt: skip
    columns = getattr(layer, names.columns)
    if columns is not None:
        x = x[..., columns]
    elif x.stride(-1) != 1:
        x = x.contiguous()  # the op wants dense rows
    return apply(x, args, kind, None, None if bias is None else bias.float(), act, act_group)
