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

from .merged import may_write

APPEND_ATTENTION = torch.ops.qkernels.append_attention.default
# Places among its arguments.
_Q, _K, _ROPE, _POSITIONS = 0, 1, 3, 4
# What keeps two equal halves equal, element by element.
_EACH = ("cos", "sin", "to", "float", "unsqueeze")


def _called(node: Any, *names: str) -> bool:
    """Whether a node calls the method, torch function or operator of such a name."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_method":
        return node.target in names
    known = (operator, torch, torch.Tensor)
    return node.op == "call_function" and any(
        node.target is getattr(module, name, None) for module in known for name in names
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    """Of the tensor that a node gives, if it is one of a fixed shape."""
    value = node.meta.get("example_value")
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    return shape if shape is not None and all(type(size) is int for size in shape) else None


def _option(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _half(node: Any, x: Node, first: bool) -> bool:
    """Whether a node is x[..., : D / 2], or x[..., D / 2 :]."""
    shape = _shape(x)
    if shape is None or shape[-1] % 2 or not _called(node, "getitem") or node.args[0] is not x:
        return False
    half = shape[-1] // 2
    return node.args[1] == (Ellipsis, slice(None, half) if first else slice(half, None))


def _halves_are_equal(node: Any) -> bool:
    """Whether the last dimension of what a node gives is the same numbers twice."""
    while _called(node, *_EACH, "mul"):
        others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, Node)]
        if others:
            return False
        node = node.args[0]
    if not _called(node, "cat") or _option(node, 1, "dim") != -1:
        return False
    parts = node.args[0]
    return len(parts) == 2 and parts[0] is parts[1]


def _rotated(node: Any) -> tuple[Node, Node, Node] | None:
    """x, cos and sin, if a node is x * cos + cat(-x2, x1) * sin, where x1 and x2 are the halves of
    x [B, H, T, D], and cos and sin [B, 1, T, D]."""
    if not (_called(node, "add") and all(_called(a, "mul") for a in node.args)):
        return None
    (x, cos), (turned, sin) = node.args[0].args, node.args[1].args
    if not (isinstance(x, Node) and _called(turned, "cat")) or _option(turned, 1, "dim") != -1:
        return None
    parts = turned.args[0]
    fits = (
        len(parts) == 2
        and _called(parts[0], "neg")
        and _half(parts[0].args[0], x, first=False)
        and _half(parts[1], x, first=True)
    )
    shape = _shape(x)
    if not fits or shape is None or len(shape) != 4:
        return None
    if node.meta["example_value"].dtype != x.meta["example_value"].dtype:
        return None  # angles of another dtype make it theirs
    batch, _, tokens, dim = shape
    for angle in (cos, sin):
        if not _called(angle, "unsqueeze") or _shape(angle) != (batch, 1, tokens, dim):
            return None
        if not _halves_are_equal(angle):
            return None
    if any(may_write(user) for user in x.users):
        return None
    return x, cos.args[0], sin.args[0]


def _source(rows: Any) -> Node | None:
    """[B, H, T, D], of which a node is the rows [B T, H, D]."""
    while _called(rows, "contiguous"):
        rows = rows.args[0]
    if not _called(rows, "reshape", "view"):
        return None
    shape = _shape(rows)
    flat = rows.args[0]
    if shape is None or not _called(flat, "transpose") or flat.args[1:] != (1, 2):
        return None
    source: Node = flat.args[0]
    whole = _shape(source)
    if whole is None or len(whole) != 4 or shape != (whole[0] * whole[2], whole[1], whole[3]):
        return None
    return source


def _appends(traced: GraphModule) -> Iterator[tuple[Node, list[tuple[Node, Node, Node]]]]:
    """Calls of append_attention whose q and k were rotated before, with what they were made of."""
    for node in traced.graph.find_nodes(op="call_function", target=APPEND_ATTENTION):
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


def _table(cos: Node, sin: Node) -> tuple[Node, Node]:
    """rope and positions of append_attention, for cos and sin [B, T, D]: a row per token."""
    graph, shape = cos.graph, _shape(cos)
    assert shape is not None
    batch, tokens, dim = shape
    halves = [graph.call_method("narrow", (x, -1, 0, dim // 2)) for x in (cos, sin)]
    rows = graph.call_function(torch.cat, (halves,), {"dim": -1})
    rows = graph.call_method("reshape", (rows, batch * tokens, dim))
    device = cos.meta["example_value"].device
    how = {"dtype": torch.int32, "device": device}
    positions = graph.call_function(torch.arange, (batch * tokens,), how)
    return graph.call_method("float", (rows,)), positions


def leave_rotation(traced: GraphModule) -> None:
    """Has `append_attention` rotate query and key in a graph that Dynamo traced, where the model
    does it as most do: all dims, in halves, by angles that are the same for all heads."""
    graph = traced.graph
    tables: dict[tuple[Node, Node], tuple[Node, Node]] = {}
    for node, both in list(_appends(traced)):
        angles = both[0][1:]
        args = list(node.args)
        with graph.inserting_before(node):
            if angles not in tables:
                tables[angles] = _table(*angles)
            args[_ROPE], args[_POSITIONS] = tables[angles]
            for i, (x, _, _) in zip((_Q, _K), both, strict=True):
                shape = _shape(x)
                assert shape is not None
                flat = graph.call_method("transpose", (x, 1, 2))
                flat = graph.call_method("reshape", (flat, -1, shape[1], shape[3]))
                args[i] = graph.call_method("contiguous", (flat,))
        unused = [node.args[i] for i in (_Q, _K)]
        node.args = tuple(args)
        for each in unused:
            _erase_unused(each)
    if tables:
        graph.lint()
        traced.recompile()
