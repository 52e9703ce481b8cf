"""The rotation of query and key in a compiled graph, left to the op that appends the key.

Models of transformers rotate [B, H, T, D] tensors before they reach the attention function, by the
same lines (`apply_rotary_pos_emb`): between calls of our ops that is a dozen operations a layer,
while `append_attention` rotates as it reads. It does so in float32 where the models round to their
dtype between the operations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .merged import may_write

APPEND_ATTENTION = torch.ops.qkernels.append_attention.default
# Places among its arguments.
_Q, _K, _ROPE, _POSITIONS, _PAGES = 0, 1, 3, 4, slice(8, 12)
# What keeps two equal halves equal, element by element.
_ELEMENTWISE = ("cos", "sin", "to", "float", "unsqueeze")


def _called(node: Any, *names: str) -> bool:
    """Whether a node calls the method, torch function or operator of such a name."""
    if not isinstance(node, Node) or not node.args:
        return False
    if node.op == "call_method":
        return node.target in names
    known = (operator, torch, torch.Tensor)
    return node.op == "call_function" and any(
        node.target is getattr(module, name, None) for module in known for name in names
    )


def _shape(node: Node) -> tuple[Any, ...] | None:
    """Of the tensor that a node gives, if it is one: numbers, and what stands for them where a
    graph serves several."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _has_shape(node: Any, *expected: Any) -> bool:
    shape = _shape(node) if isinstance(node, Node) else None
    if shape is None or len(shape) != len(expected):
        return False
    return all(statically_known_true(a == b) for a, b in zip(shape, expected, strict=True))


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("example_value"), "dtype", None)


def _is_floating(node: Node) -> bool:
    dtype = _dtype(node)
    return dtype is None or dtype.is_floating_point


def _operands(node: Any, name: str) -> tuple[Any, Any] | None:
    """The two that a node adds or multiplies, or that it puts side by side in the last
    dimension."""
    if not _called(node, name):
        return None
    operands, options = node.args, dict(node.kwargs)
    if name == "cat":
        operands = node.args[0] if node.args else ()
        if len(node.args) > 1:
            options["dim"] = node.args[1]
        if options.pop("dim", 0) != -1:
            return None
    two = isinstance(operands, (list, tuple)) and len(operands) == 2
    return tuple(operands) if two and not options else None


def _half(node: Any, x: Node, first: bool) -> bool:
    """Whether a node is x[..., : D / 2], or x[..., D / 2 :]."""
    shape = _shape(x)
    if not shape or type(shape[-1]) is not int or shape[-1] % 2:
        return False
    if not _called(node, "getitem") or node.args[0] is not x:
        return False
    half = shape[-1] // 2
    kept = slice(None, half) if first else slice(half, None)
    return bool(node.args[1] == (Ellipsis, kept))


def _halves_are_equal(node: Any) -> bool:
    """Whether the last dimension of what a node gives is the same numbers twice."""
    while _called(node, *_ELEMENTWISE, "mul"):
        others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, Node)]
        if others:
            return False
        node = node.args[0]
    parts = _operands(node, "cat")
    return parts is not None and parts[0] is parts[1]


def _rotated(node: Any) -> tuple[Node, Node, Node] | None:
    """x, cos and sin, if a node is x * cos + cat(-x2, x1) * sin, where x1 and x2 are the halves of
    x [B, H, T, D], and cos and sin [B, 1, T, D]."""
    terms = _operands(node, "add") or (None, None)
    first, second = (_operands(term, "mul") for term in terms)
    if first is None or second is None:
        return None
    (x, cos), (turned, sin) = first, second
    parts = _operands(turned, "cat")
    if parts is None or not isinstance(x, Node) or not _called(parts[0], "neg"):
        return None
    if not (_half(parts[0].args[0], x, first=False) and _half(parts[1], x, first=True)):
        return None
    shape = _shape(x)
    if shape is None or len(shape) != 4 or _dtype(node) != _dtype(x):
        return None  # angles of another dtype make the result theirs
    batch, _, tokens, dim = shape
    for angle in (cos, sin):
        if not _called(angle, "unsqueeze") or not _has_shape(angle, batch, 1, tokens, dim):
            return None
        if not _has_shape(angle.args[0], batch, tokens, dim) or not _halves_are_equal(angle):
            return None
    return x, cos.args[0], sin.args[0]


def _source(rows: Any) -> Node | None:
    """[B, H, T, D], of which a node is the rows [B T, H, D]."""
    while _called(rows, "contiguous"):
        rows = rows.args[0]
    if not _called(rows, "reshape", "view"):
        return None
    flat = rows.args[0]
    if not _called(flat, "transpose") or flat.args[1:] != (1, 2):
        return None
    source: Node = flat.args[0]
    shape = _shape(source)
    if shape is None or len(shape) != 4 or not type(shape[1]) is type(shape[3]) is int:
        return None
    batch, heads, tokens, dim = shape
    return source if _has_shape(rows, batch * tokens, heads, dim) else None


def _written(node: Node) -> list[Any]:
    """What a node that writes may write to; None: who knows."""
    schema = getattr(node.target, "_schema", None)
    plain = node.op == "call_method" or getattr(node.target, "__module__", "") == "_operator"
    if node.kwargs or (schema is None and not plain):
        return [None]
    if schema is None:
        return list(node.args[:1])
    named = zip(schema.arguments, node.args, strict=False)
    return [
        given
        for argument, given in named
        if given is not None and argument.alias_info is not None and argument.alias_info.is_write
    ]


def _appends(traced: GraphModule) -> Iterator[tuple[Node, list[tuple[Node, Node, Node]]]]:
    """Calls of append_attention whose q and k were rotated before, with what they were made of."""
    calls = traced.graph.find_nodes(op="call_function", target=APPEND_ATTENTION)
    pages = {given for call in calls for given in call.args[_PAGES]}
    # What is written to may be what was rotated, or a view of it, and be read too late: but for the
    # state of a cache, its pages and integers.
    for node in traced.graph.nodes:
        if may_write(node) and not all(
            isinstance(given, Node)
            and given.op == "placeholder"
            and (given in pages or not _is_floating(given))
            for given in _written(node)
        ):
            return
    for node in calls:
        if node.kwargs or node.args[_ROPE] is not None:
            continue
        found = [_rotated(_source(node.args[i])) for i in (_Q, _K)]
        both = [each for each in found if each is not None]
        if len(both) == 2 and both[0][1:] == both[1][1:]:
            yield node, both


def _erase_unused(node: Any) -> None:
    """Erases a node that nobody uses, and what was there for it alone."""
    if isinstance(node, Node) and not node.users and node.op.startswith("call_"):
        if may_write(node):
            return
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for each in inputs:
            _erase_unused(each)


def _table(cos: Node, sin: Node, dim: int) -> tuple[Node, Node]:
    """rope and positions of append_attention, for cos and sin [B, T, dim]: a row per token."""
    graph = cos.graph
    halves = [graph.call_method("narrow", (x, -1, 0, dim // 2)) for x in (cos, sin)]
    rows = graph.call_function(torch.cat, (halves,), {"dim": -1})
    rows = graph.call_method("reshape", (rows, -1, dim))
    how = {"dtype": torch.int32, "device": cos.meta["example_value"].device}
    positions = graph.call_function(torch.arange, (graph.call_method("size", (rows, 0)),), how)
    return graph.call_method("float", (rows,)), positions


def fold_rotary(traced: GraphModule) -> None:
    """Has `append_attention` rotate query and key in a graph that Dynamo traced, where the model
    does it as most do: all dims, in halves, by angles that are the same for all heads."""
    graph = traced.graph
    tables: dict[tuple[Node, Node], tuple[Node, Node]] = {}
    for node, both in list(_appends(traced)):
        angles = both[0][1:]
        args = list(node.args)
        with graph.inserting_before(node):
            for i, (x, _, _) in zip((_Q, _K), both, strict=True):
                shape = _shape(x)
                assert shape is not None
                if angles not in tables:
                    tables[angles] = _table(*angles, dim=shape[3])
                flat = graph.call_method("transpose", (x, 1, 2))
                flat = graph.call_method("reshape", (flat, -1, shape[1], shape[3]))
                args[i] = graph.call_method("contiguous", (flat,))
            args[_ROPE], args[_POSITIONS] = tables[angles]
        unused = [node.args[i] for i in (_Q, _K)]
        node.args = tuple(args)
        for each in dict.fromkeys(unused):
            _erase_unused(each)
    if tables:
        graph.lint()
        traced.recompile()
