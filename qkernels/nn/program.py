"""A model as a program: a tuple of steps over named registers.

A register is a float tensor `[T, width]`, one row per token of the ragged batch. A model family
writes its steps once, in `qkernels/models/`; `lower` decides where activations are quantized; and
the lowered steps are what both executors run: the composed one (`qkernels/nn/executor.py`, one
torch op per step) and the native one (`decoder_step`, one call for all of them). A test holds the
two bitwise equal.

Weights are named; a name stands for a `PackedWeight`, a dense matrix `[N, K]`, or a float32 vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Embed:
    """dst = rows `ids` of the table `weight`, times `multiplier`."""

    dst: str
    weight: str
    multiplier: float = 1.0


@dataclass(frozen=True)
class Input:
    """dst = the rows [T, width] that come in place of token ids: what a host has looked up."""

    dst: str
    width: int


@dataclass(frozen=True)
class Output:
    """dst = the wanted rows of src + add: what goes back to a host, instead of logits."""

    dst: str
    src: str
    add: str | None = None


@dataclass(frozen=True)
class Norm:
    """dst = norm(src) * weight + bias; with `add`, src is first added to that register, which keeps
    the sum.

    center: LayerNorm, otherwise RMSNorm. heads > 0: each of `heads` equal slices of a row is
    normalised by itself. act_group is set by `lower`: 0 for float output, else dst is quantized in
    groups of that many columns.
    """

    dst: str
    src: str
    weight: str
    bias: str | None = None
    add: str | None = None
    eps: float = 1e-5
    center: bool = False
    heads: int = 0
    act_group: int = 0


@dataclass(frozen=True)
class Linear:
    """dst = src @ weight.T + bias. Set by `lower`: act_group, 0 when src is float, else src is
    quantized; order, the weight by whose column order src is sorted, None for natural order.
    """

    dst: str
    src: str
    weight: str
    bias: str | None = None
    act_group: int = 0
    order: str | None = None


@dataclass(frozen=True)
class KvAppend:
    """Rotates q and k by the table `rope` (None: no rotation), writes k and v to layer `layer` of
    the cache.

    The rotated queries go to `dst`.
    """

    dst: str
    q: str
    k: str
    v: str
    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rope: str | None = "rope"


@dataclass(frozen=True)
class Attention:
    """dst = causal attention of q over layer `layer` of the cache; window 0 and softcap 0 mean
    none.
    """

    dst: str
    q: str
    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class Gate:
    """dst = activation(gate) * up, or activation(gate) without `up`. act_group as in `Norm`."""

    dst: str
    gate: str
    up: str | None
    activation: str
    act_group: int = 0


@dataclass(frozen=True)
class Select:
    """dst = the rows of src whose logits are wanted."""

    dst: str
    src: str


@dataclass(frozen=True)
class Quantize:
    """dst = src quantized to int8 in groups of `act_group` columns; inserted by `lower`."""

    dst: str
    src: str
    act_group: int


@dataclass(frozen=True)
class Permute:
    """dst = the columns of src in the order of the packed columns of weight `order`, whose
    `PackedWeight.perm` has it; inserted by `lower`.
    """

    dst: str
    src: str
    order: str


Step = (
    Embed
    | Input
    | Output
    | Norm
    | Linear
    | KvAppend
    | Attention
    | Gate
    | Select
    | Quantize
    | Permute
)


def reads(step: Step) -> tuple[str, ...]:
    """Registers that the step reads."""
    match step:
        case Embed() | Input():
            return ()
        case Norm() | Output():
            return (step.src,) if step.add is None else (step.src, step.add)
        case KvAppend():
            return (step.q, step.k, step.v)
        case Attention():
            return (step.q,)
        case Gate():
            return (step.gate,) if step.up is None else (step.gate, step.up)
        case _:
            return (step.src,)


def writes(step: Step) -> tuple[str, ...]:
    """Registers that the step writes."""
    if isinstance(step, Norm) and step.add is not None:
        return (step.dst, step.add)
    return (step.dst,)


def hidden_program(steps: Sequence[Step], width: int) -> tuple[Step, ...]:
    """The program of a model between its embedding and its last norm: rows of hidden states in,
    [T, width], rows of hidden states out. Raises ValueError for a program of another form.
    """
    match steps:
        case [Embed(dst=dst), *layers, Norm(src=src, add=add), Select(), Linear()]:
            return (Input(dst, width), *layers, Output("hidden", src, add))
    raise ValueError("expected an embedding, layers, and a norm, a select and a linear at the end")


def layer_programs(steps: Sequence[Step], width: int) -> list[tuple[Step, ...]]:
    """As `hidden_program`, but one program for each layer. Layers begin at the norm that takes in
    what the layer before has given; the sum that it makes is the output of that layer.
    """
    first, *inner, last = hidden_program(steps, width)
    assert isinstance(first, Input) and isinstance(last, Output)
    layers: list[list[Step]] = []
    current = None
    for step in inner:
        at = _layer_of(step)
        if at is not None and at != current:
            layers.append([])
            current = at
        layers[-1].append(step)
    programs = []
    for i, (norm, *rest) in enumerate(layers):
        sums = (first.dst, None) if i == 0 else (last.src, last.add)
        if not isinstance(norm, Norm) or (norm.src, norm.add) != sums or norm.heads:
            raise ValueError(f"expected layer {i} to begin with the norm of {sums}, got {norm}")
        programs.append((first, replace(norm, src=first.dst, add=None), *rest, last))
    return programs


def _layer_of(step: Step) -> int | None:
    """The number of the layer whose weight or cache the step uses, if any."""
    if isinstance(step, (KvAppend, Attention)):
        return step.layer
    if isinstance(step, (Norm, Linear)):
        return int(step.weight.split(".")[1])
    return None


def _next_uses(steps: Sequence[Step], start: int, register: str) -> list[Step]:
    """The steps after `start` that read `register` before it is written again."""
    uses: list[Step] = []
    for step in steps[start + 1 :]:
        if register in reads(step):
            uses.append(step)
        if register in writes(step):
            break
    return uses


class _Made:
    """What has been made of each float register since it was last written, by name."""

    def __init__(self) -> None:
        self._orders: dict[str, list[str]] = {}
        self._quantized: dict[str, set[str]] = {}

    def written(self, register: str) -> None:
        self._orders.pop(register, None)
        self._quantized.pop(register, None)

    def emitted(self, register: str, group: int) -> str:
        """The name of `register` quantized, which the step that writes it does itself."""
        name = f"{register}:{group}"
        self._quantized.setdefault(register, set()).add(name)
        return name

    def wanted(self, register: str, group: int, order: str | None) -> tuple[str, list[Step]]:
        """The name of `register` sorted by `order` and quantized by `group`, and the steps that are
        still needed for it. Sorted ones are numbered, so that all layers share their memory.
        """
        steps: list[Step] = []
        name = register
        if order is not None:
            orders = self._orders.setdefault(register, [])
            known = order in orders
            if not known:
                orders.append(order)
            name = f"{register}@{orders.index(order)}"
            if not known:
                steps.append(Permute(name, register, order))
        if group:
            quantized = self._quantized.setdefault(register, set())
            source, name = name, f"{name}:{group}"
            if name not in quantized:
                quantized.add(name)
                steps.append(Quantize(name, source, group))
        return name, steps


def lower(
    steps: Sequence[Step],
    act_group_of: Callable[[str], int],
    order_of: Callable[[str], str | None] = lambda _: None,
) -> tuple[Step, ...]:
    """Decides where activations are quantized, and where their columns are sorted.

    act_group_of(weight name) is the group of int8 activations that a linear on this weight takes, 0
    for float ones. A norm or gate whose result goes only to quantized linears of one group emits it
    quantized, so that the values are quantized once, where they are hot. Elsewhere a `Quantize`
    step is put before the first linear that needs it. Quantized registers are called
    `<name>:<group>`.

    order_of(weight name) is None for columns in natural order, else the weight that stands for its
    order: the same name for all weights of one order, so that their activations are sorted once.
    Sorted registers are called `<name>@<number>`.
    """
    wanted = [
        replace(s, act_group=act_group_of(s.weight), order=order_of(s.weight))
        if isinstance(s, Linear)
        else s
        for s in steps
    ]
    out: list[Step] = []
    made = _Made()
    for i, step in enumerate(wanted):
        if isinstance(step, Linear):
            name, before = made.wanted(step.src, step.act_group, step.order)
            out += before
            step = replace(step, src=name)
        for register in writes(step):
            made.written(register)
        if isinstance(step, (Norm, Gate)):
            uses = _next_uses(wanted, i, step.dst)
            groups = {
                use.act_group if isinstance(use, Linear) and use.order is None else 0
                for use in uses
            }
            per_row = not (isinstance(step, Norm) and step.heads)
            if per_row and len(groups) == 1 and 0 not in groups:
                group = groups.pop()
                step = replace(step, dst=made.emitted(step.dst, group), act_group=group)
        out.append(step)
    return tuple(out)
