"""Packed linear layers of a compiled graph that read the same input, as one call.

Query, key and value, or gate and up, are calls of their own in every model of transformers. A call
costs a decode step as much as a small matrix does, and quantizes the input anew. Rows of packed
weights lie in blocks of 64, so that several weights are one if they lie behind each other: their
tensors are moved into common ones, of which they stay views. Who changes them in place changes
both; who replaces one has it moved as well, by the next call that looks. What was taken of them
before, as a state_dict, keeps the values of then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from operator import index, itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ..quant.layout import UNIT_ROWS, padded_n

LINEAR = torch.ops.qkernels.linear.default
# Places among its arguments: x, six tensors of a weight, of which the last is a table, four
# numbers, bias, act, act_group, residual.
_TENSORS, _TABLE, _N, _BIAS, _RESIDUAL = range(1, 6), 6, 9, 11, 14
_ARGUMENTS = 15
# What hands on the values that it is given: layers reshape their common input each by itself.
_SAME = ("reshape", "view", "contiguous")
_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul",
    "lshift", "rshift",
)  # fmt: skip

_moving = threading.Lock()


@dataclass
class _Call:
    """One call of `linear`. parts: of its tensors, the bias last, the numbers among the inputs of
    the graph, None for one that is not there."""

    node: Node
    n: int
    parts: tuple[int | None, ...]


def _value_of(node: Any) -> Hashable:
    """What is equal for nodes that have the same value and shape."""
    if isinstance(node, Node) and node.op == "call_method" and node.target in _SAME:
        return node.target, *map(_value_of, node.args), *sorted(node.kwargs.items())
    return node


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def may_write(node: Node) -> bool:
    """Whether a node may write into something: rather too often than not."""
    if node.op not in ("call_method", "call_function"):
        return node.op == "call_module"
    schema, name = getattr(node.target, "_schema", None), _name(node)
    if schema is not None:
        return bool(schema.is_mutable)
    if isinstance(node.target, OpOverloadPacket):
        overloads = (getattr(node.target, name) for name in node.target.overloads())
        return any(overload._schema.is_mutable for overload in overloads)
    if isinstance(node.target, HigherOrderOperator):  # whose graph may do anything
        return True
    if isinstance(node.target, FunctionType) and not node.target.__module__.startswith("torch"):
        return True  # somebody's own, that Dynamo was told to leave as it is
    if name.startswith("embedding") and (node.args[3:4] or (node.kwargs.get("max_norm"),))[0]:
        return True  # rows of the table are scaled down
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_function" and any(arg is True for arg in node.args):
        return True  # `inplace` by its place
    special = name.startswith("__") and name.endswith("__")
    if name.endswith("_") and not special:
        return True
    name = name.strip("_")
    return name == "setitem" or (name.startswith("i") and name[1:] in _OPERATORS)


def _linear_calls(traced: GraphModule, inputs: Sequence[Any]) -> Iterable[tuple[Hashable, _Call]]:
    """The calls that could be part of another, each with what it has in common with others."""
    places = {node: i for i, node in enumerate(traced.graph.find_nodes(op="placeholder"))}
    writes = 0  # before a call: who reads on both sides of one may see something else
    for node in traced.graph.nodes:
        writes += may_write(node)
        if node.op != "call_function" or node.target is not LINEAR:
            continue
        args = (*node.args, *(None,) * (_ARGUMENTS - len(node.args)))
        given = [args[i] for i in (*_TENSORS, _BIAS)]
        there = [a for a in given if a is not None]
        # Inputs of the graph that nobody else reads, who would get a common tensor in their place.
        if not all(a in places and len(a.users) == 1 for a in there):
            continue
        if node.kwargs or args[_RESIDUAL] is not None:
            continue
        tensors = [inputs[places[a]] for a in there]
        if not all(map(_movable, tensors)) or not isinstance(args[_N], int):
            continue
        if args[_BIAS] is not None and args[_N] % UNIT_ROWS:  # biases are not filled up to blocks
            continue
        table = args[_TABLE]
        if table is not None:
            table = tuple(inputs[places[table]].tolist()) if table in places else table
        common = (
            writes, _value_of(args[0]), table, *args[_TABLE + 1 : _N], *args[_N + 1 : _BIAS],
            *args[_BIAS + 1 :], *((a is None) for a in given), *(t.dtype for t in tensors),
        )  # fmt: skip
        parts = tuple(None if a is None else places[a] for a in given)
        yield common, _Call(node, args[_N], parts)


def _movable(tensor: Any) -> bool:
    """Whether other memory may be put under a tensor."""
    return (
        isinstance(tensor, Tensor)
        and not isinstance(tensor, FakeTensor)
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not tensor.is_inference()
        and not tensor.is_shared()
        and tensor.is_contiguous()
    )


def _groups(traced: GraphModule, inputs: Sequence[Any]) -> list[list[_Call]]:
    found: dict[Hashable, list[_Call]] = {}
    for common, call in _linear_calls(traced, inputs):
        found.setdefault(common, []).append(call)
    return [calls for calls in found.values() if len(calls) > 1]


class _Places:
    """Where the tensors of the groups lie, for every model that a graph serves.

    columns: for each common tensor the numbers of the inputs that it is made of.
    """

    def __init__(self, columns: list[list[int]]) -> None:
        self.columns = columns
        self.pieces = itemgetter(*(i for column in columns for i in column))
        # By the id of a model's first tensor: the common ones, and the ids and addresses of the
        # pieces, since models may share a part of them.
        self.known: dict[int, tuple[list[Tensor], list[int], list[int]]] = {}
        # What lay under the pieces, until a later call looks: another thread may be computing with
        # it.
        self.replaced: list[Any] = []

    def common(self, args: Sequence[Any], *, look: bool = True) -> list[Any]:
        """These inputs, the first ones of the columns replaced by the common tensors, into which
        all of them are moved if need be. look: whether they lie where they did; without it the
        same tensors are taken to."""
        found = self.known.get(id(args[self.columns[0][0]]))
        if found is not None and list(map(id, self.pieces(args))) != found[1]:
            found = None
        if found is not None and look:
            if list(map(Tensor.data_ptr, self.pieces(args))) != found[2]:
                found = None
            elif self.replaced:
                self.replaced = []
        if found is None:
            with _moving:
                found = self._move(args)
        out = list(args)
        for column, tensor in zip(self.columns, found[0], strict=True):
            out[column[0]] = tensor
        return out

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move(self, args: Sequence[Tensor]) -> tuple[list[Tensor], list[int], list[int]]:
        first = args[self.columns[0][0]]
        if id(first) not in self.known:
            weakref.finalize(first, self.known.pop, id(first), None)
        self.replaced = [t.untyped_storage() for t in self.pieces(args)]
        commons = [_joined([args[i] for i in column]) for column in self.columns]
        pieces = self.pieces(args)
        found = commons, list(map(id, pieces)), list(map(Tensor.data_ptr, pieces))
        self.known[id(first)] = found
        return found


def _joined(tensors: list[Tensor]) -> Tensor:
    """One tensor, of which these are the parts one after another, as they are or from now on."""
    first = tensors[0]
    shape = [sum(t.shape[0] for t in tensors), *first.shape[1:]]
    ends = accumulate((t.nbytes for t in tensors), initial=first.data_ptr())
    storage = first.untyped_storage()
    if all(
        t.untyped_storage().data_ptr() == storage.data_ptr() and t.data_ptr() == at
        for t, at in zip(tensors, ends, strict=False)
    ):  # another graph has joined them before
        whole = torch.empty(0, dtype=first.dtype)
        return whole.set_(storage, first.storage_offset(), shape, first.stride())
    same = torch.uint8 if first.itemsize == 1 else first.dtype  # torch joins no float8
    whole = torch.cat([t.view(same) for t in tensors]).view(first.dtype)
    for tensor, part in zip(tensors, whole.split([t.shape[0] for t in tensors]), strict=True):
        tensor.data = part
    return whole


def _examples(inputs: Sequence[Any], columns: Iterable[list[int]]) -> list[Any]:
    """Inputs to compile with: the common tensors as shapes alone. Nothing may move before, since
    Dynamo has noted where everything lies."""
    context = TracingContext.try_get()
    fake = None if context is None else context.fake_mode
    out = list(inputs)
    with fake or nullcontext():
        for column in columns:
            tensor = inputs[column[0]]
            rows = sum(inputs[i].shape[0] for i in column)
            out[column[0]] = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
    return out


def merged(
    traced: GraphModule, inputs: Sequence[Any], inner: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What `inner`, a backend of torch.compile, makes of a graph that Dynamo traced, with its
    linear layers merged where they can be. Layers on a GPU stay as they are.

    The second of the two is for calls after one of the first, while nobody replaces a layer: it
    does not look where a model's tensors are."""
    groups = _groups(traced, inputs)
    if not groups:
        run = inner(traced, inputs)
        return run, run
    graph = traced.graph
    columns: list[list[int]] = []
    for calls in groups:
        first = calls[0].node
        args = [*first.args, *[None] * (_ARGUMENTS - len(first.args))]
        # The input of the first one stands for all: Dynamo alone can make new ones.
        columns += [
            [index(i) for i in c]
            for c in zip(*(call.parts for call in calls), strict=True)
            if c[0] is not None
        ]
        *starts, stop = accumulate((padded_n(call.n) for call in calls), initial=0)
        args[_N] = stop - padded_n(calls[-1].n) + calls[-1].n
        rows = first.meta["example_value"].shape[0]
        with graph.inserting_before(first):
            whole = graph.call_function(LINEAR, tuple(args))
            for call, start in zip(calls, starts, strict=True):
                part = graph.call_function(torch.narrow, (whole, 1, start, call.n))
                if not (isinstance(rows, int) and rows == 1):  # as the layer's own result
                    part = graph.call_method("contiguous", (part,))
                part.meta.update(call.node.meta)
                call.node.replace_all_uses_with(part)
    for calls in groups:
        for call in calls:
            graph.erase_node(call.node)
    graph.lint()
    traced.recompile()
    places = _Places(columns)
    run = inner(traced, _examples(inputs, columns))
    return (
        lambda *args: run(*places.common(args)),
        lambda *args: run(*places.common(args, look=False)),
    )
