"""y = x W^T + bias + residual over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..quant.spec import round_up
from ..quant.weight import PackedWeight, WeightKind
from . import checks
from .act import QuantAct
from .registry import WEIGHT, define

ACTS = ("int8", "float")
_W = 10  # arguments that a weight is; the last ones are n and k


# The dispatcher leaves out a last argument that is its default, hence (*..., None).
def check_linear(x: Tensor, *args: Any) -> None:
    weight, (bias, act, act_group, residual) = args[:_W], (*args[_W:], None)[:4]
    checks.weight("linear", *weight)
    checks.rows("linear", "x", x)
    checks.float_type("linear", "x", x.dtype)
    n, k = weight[-2:]
    if x.shape[1] != k:
        checks.fail("linear", f"x must be [M, {k}], got {list(x.shape)}")
    _check_addends("linear", bias, residual, x.shape[0], n, x.dtype)
    if act not in ACTS:
        checks.fail("linear", f'act must be "int8" or "float", got "{act}"')
    if act == "int8":
        check_groups("linear", weight[-3], act_group)
    checks.same_device("linear", "x", x.device, codes=weight[0], bias=bias, residual=residual)


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    check_linear(x, *args)
    return x.new_empty((x.shape[0], args[_W - 2]))


def _check_addends(
    op: str, bias: Tensor | None, residual: Tensor | None, m: int, n: int, dtype: torch.dtype
) -> None:
    if bias is not None:
        checks.expect(op, "bias", bias, torch.float32, [n])
    if residual is not None:
        if residual.dtype != dtype:
            names = checks.type_name(dtype), checks.type_name(residual.dtype)
            checks.fail(op, f"residual must be {names[0]} like the result, got {names[1]}")
        checks.rows(op, "residual", residual)
        if residual.shape[0] != m or residual.shape[1] != n:
            given = list(residual.shape)
            checks.fail(op, f"residual must be [{m}, {n}] like the result, got {given}")


def check_groups(op: str, group: int, act_group: int) -> None:
    checks.act_group(op, act_group)
    if group % act_group and act_group % group:
        checks.fail(
            op,
            f"one of group_size and act_group must divide the other, got {group} and {act_group}",
        )


def check_linear_quant(act_codes: Tensor, act_scale: Tensor, act_sums: Tensor, *args: Any) -> None:
    op = "linear_quant"
    weight, (bias, dtype, residual) = args[:_W], (*args[_W:], None)[:3]
    checks.weight(op, *weight)
    checks.float_type(op, "dtype", dtype)
    n, k = weight[-2:]
    checks.expect(op, "act_codes", act_codes, torch.int8, [-1, -1])
    m, kx = act_codes.shape
    checks.expect(op, "act_scale", act_scale, torch.float32, [m, -1])
    groups = act_scale.shape[1]
    group = kx // groups if groups else 0
    if group < 16 or group % 16 or kx != groups * group or kx != round_up(k, group):
        checks.fail(
            op,
            f"act_codes must have k = {k} columns rounded up to whole groups of act_scale, got "
            f"{list(act_codes.shape)} and {list(act_scale.shape)}",
        )
    checks.expect(op, "act_sums", act_sums, torch.int16, [m, kx // 16])
    _check_addends(op, bias, residual, m, n, dtype)
    check_groups(op, weight[-3], group)
    checks.same_device(
        op,
        "act_codes",
        act_codes.device,
        act_scale=act_scale,
        act_sums=act_sums,
        codes=weight[0],
        bias=bias,
        residual=residual,
    )


def _linear_quant_fake(
    act_codes: Tensor, act_scale: Tensor, act_sums: Tensor, *args: Any
) -> Tensor:
    check_linear_quant(act_codes, act_scale, act_sums, *args)
    return act_codes.new_empty((act_codes.shape[0], args[_W - 2]), dtype=args[_W + 1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[0], inputs[1 : _W + 1], inputs[_W + 1]
    if bias is not None and bias.requires_grad:
        raise RuntimeError(
            "qkernels::linear: bias is fixed: only x and residual may require a gradient; add a "
            "trainable bias to the result"
        )
    ctx.save_for_backward(*(t for t in weight[:6] if t is not None))
    ctx.given = [t is not None for t in weight[:6]]
    ctx.numbers = weight[6:]
    ctx.x_dtype = x.dtype
    ctx.residual = inputs[_W + 4] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """To x and residual: weights are constants. The rounding of int8 activations counts as the
    identity."""
    x_grad = None
    if ctx.needs_input_grad[0]:
        saved = iter(ctx.saved_tensors)
        tensors = [next(saved) if given else None for given in ctx.given]
        weight = select("dequantize", grad.device)(*tensors, *ctx.numbers, torch.float32)
        x_grad = (grad.float() @ weight).to(ctx.x_dtype)
    return (x_grad, *(None for _ in range(_W + 3)), grad if ctx.residual else None)


define(
    "linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, str act, int act_group, Tensor? residual=None) -> Tensor",
    fake=_linear_fake,
    reference=checks.checked(check_linear, reference.linear),
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "linear_quant",
    f"(Tensor act_codes, Tensor act_scale, Tensor act_sums, {WEIGHT}, Tensor? bias, "
    "ScalarType dtype, Tensor? residual=None) -> Tensor",
    fake=_linear_quant_fake,
    reference=checks.checked(check_linear_quant, reference.linear_quant),
)


def default_act_group(weight: PackedWeight) -> int:
    """Columns that share an activation scale: a weight group; with two-level scales a block of 256,
    so that the
    integer parts of the scales can multiply integer sums."""
    return 256 if weight.spec.two_level else weight.group


def resolve_act(act: str, device: torch.device) -> str:
    """ "auto" is "int8" on a CPU, whose integer dot products are its fastest, and "float"
    elsewhere."""
    if act == "auto":
        return "int8" if device.type == "cpu" else "float"
    return act


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    act: str = "auto",
    act_group: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] float32, float16 or bfloat16 -> [..., N] of the same dtype; accumulated in
    float32.

    bias [N] float32; act: "int8" quantizes x by row and act_group columns first, "float" does not,
    "auto" depends on the device. act_group: a multiple of 16; None is `default_act_group`.
    residual [..., N] of x's dtype is added before the one rounding to it: sum + bias + residual,
    in float32 and in this order. Rows of x and residual must be dense. The gradient goes to these
    two alone. Raises RuntimeError for anything that does not fit.
    """
    group = default_act_group(weight) if act_group is None else act_group
    act = resolve_act(act, x.device)
    return apply(x, weight.op_args(), weight.kind, weight.perm, bias, act, group, residual)


def apply(
    x: Tensor,
    args: tuple[Any, ...],
    kind: WeightKind,
    perm: Tensor | None,
    bias: Tensor | None,
    act: str,
    act_group: int,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` on the arguments of a packed weight, whose kind and perm they do not tell; act is
    resolved. For modules, which hold the tensors themselves: a call spends microseconds."""
    *_, group, n, k = args
    if act == "float":
        act_group = 0
    if x.dim() == 0:
        checks.fail("linear", f"x must be [..., {k}], got []")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if perm is not None:
        if rows.shape[1] != k:
            checks.fail("linear", f"x must be [M, {k}], got {list(rows.shape)}")
        rows = rows[:, perm]
    if residual is not None and x.dim() != 2:
        y_shape = [*x.shape[:-1], n]
        if list(residual.shape) != y_shape:
            given = list(residual.shape)
            checks.fail("linear", f"residual must be {y_shape} like the result, got {given}")
        residual = residual.reshape(-1, n)
    op = select("linear", x.device, weight=kind, act=act, group=group, act_group=act_group)
    if _needs_autograd(x, bias, residual):
        y = op(rows, *args, bias, act, act_group, residual)
    else:  # the autograd of torch.library runs in Python, and costs twice what the op does
        with torch._C._AutoDispatchBelowAutograd():
            y = op(rows, *args, bias, act, act_group, residual)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)


def _check_tangent(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        checks.fail("linear", f"{name} has a tangent, and there is no forward-mode derivative")


def _needs_autograd(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the op must be called through autograd, also by those who trace it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        _check_tangent("x", x)
        _check_tangent("residual", residual)
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def linear_quant(
    act: QuantAct,
    weight: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
) -> Tensor:
    """QuantAct of x [M, K] -> [M, N] of dtype: what `linear` with act="int8" does after quantizing.

    residual: [M, N] of dtype, rows dense. Raises RuntimeError for anything that does not fit, also
    for a residual that requires a gradient, and for act-order weights, whose columns x must be
    sorted by before it is quantized.
    """
    if residual is not None:
        checks.no_gradient("linear_quant", residual)
    if weight.perm is not None:
        checks.fail(
            "linear_quant",
            "an act-order weight needs its activations sorted before they are quantized; use "
            "linear",
        )
    op = select(
        "linear_quant",
        act.codes.device,
        weight=weight.kind,
        act="int8",
        group=weight.group,
        act_group=act.group,
    )
    return op(*act, *weight.op_args(), bias, dtype, residual)
