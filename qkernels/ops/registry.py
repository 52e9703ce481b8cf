"""One definition per op, repeated in every namespace that implements it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Tensors and numbers of one packed weight, in the order every schema lists them (see
# docs/design.md).
WEIGHT = (
    "Tensor codes, Tensor scale, Tensor? zero, Tensor? block_scale, Tensor? block_zero, "
    "Tensor? table, int bits, int group_size, int n, int k"
)
# A ragged batch over a paged cache.
RAGGED = "Tensor query_start, Tensor kv_len, Tensor page_table"
# What scores of attention take beyond scale * q . k.
SCORE_BIAS = "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? distance_bias=None"

NATIVE = "qkernels"
REFERENCE = "qkernels_reference"
TRITON = "qkernels_triton"


@dataclass(frozen=True)
class OpDef:
    """Schema without the namespace, the fake (which also checks), and autograd if there is one."""

    name: str
    schema: str
    fake: Callable[..., Any] | None
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., Any] | None = None


_defs: dict[str, OpDef] = {}
_libraries: dict[str, torch.library.Library] = {}


def computing() -> list[str]:
    """Names of the ops that compute something, which have a fake; the others manage state."""
    return sorted(name for name, op in _defs.items() if op.fake is not None)


def _add(op: OpDef, namespace: str) -> None:
    library = _libraries[namespace]
    library.define(
        op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    )
    qualified = f"{namespace}::{op.name}"
    if op.fake is not None:
        torch.library.register_fake(qualified, op.fake, lib=library)
    if op.backward is not None:
        torch.library.register_autograd(
            qualified, op.backward, setup_context=op.setup_context, lib=library
        )
    elif op.fake is not None:
        # Results never ask for a gradient. Without this, torch 2.15 says that float results do, and
        # then only warns.
        library.impl(op.name, torch.library.fallthrough_kernel, "Autograd")


def define_namespace(namespace: str) -> torch.library.Library:
    """Opens a namespace that has every op, those defined later too; returns its library."""
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "DEF")
        for op in _defs.values():
            _add(op, namespace)
    return _libraries[namespace]


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any] | None,
    reference: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Defines an op in every open namespace.

    schema: "(Tensor x, ...) -> Tensor", without the name. fake: computes output shapes and raises
    on bad metadata, the same way as the kernels do. reference: the float32 definition, registered
    in `qkernels_reference`.
    """
    op = OpDef(name, schema, fake, backward, setup_context)
    _defs[name] = op
    for namespace in _libraries:
        _add(op, namespace)
    if reference is not None:
        _libraries[REFERENCE].impl(name, reference, "CompositeExplicitAutograd")


def no_backward(name: str) -> Callable[..., Any]:
    """A backward for ops that have none: it says so, where torch would only warn and give no
    gradient.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"qkernels::{name}: has no backward; call it under torch.no_grad()")

    return backward


def fake(name: str) -> Callable[..., Any]:
    """The fake of a computing op: it raises on bad metadata, and on real tensors makes its outputs,
    empty."""
    found = _defs[name].fake
    assert found is not None, f"{name} computes nothing"
    return found


def implement(namespace: str, name: str, function: Callable[..., Any], key: str) -> None:
    """Registers a Python implementation of a defined op for a dispatch key ("CUDA", "CPU")."""
    _libraries[namespace].impl(name, function, key)


define_namespace(NATIVE)
define_namespace(REFERENCE)
define_namespace(TRITON)
