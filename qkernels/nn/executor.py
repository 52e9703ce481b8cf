"""Runs a lowered program: step by step through the torch ops, or as one native call per batch of
tokens.

Both take the same inputs and, on the CPU, give bitwise the same logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from qkernels import ops
from qkernels.cache import Batch, PagedKVCache
from qkernels.huge_pages import use_huge_pages
from qkernels.nn.program import (
    Attention,
    Embed,
    Gate,
    Input,
    KvAppend,
    Linear,
    Norm,
    Output,
    Permute,
    Quantize,
    Select,
    Step,
    writes,
)
from qkernels.quant.weight import PackedWeight

Weight = PackedWeight | torch.Tensor


class Executor(Protocol):
    """Something that turns token ids into logits and appends their keys and values to the cache.

    For a program that begins with an `Input`, rows [T, width] take the place of the ids, in the
    type of the registers; where one ends with an `Output`, its rows that of the logits.
    """

    def __call__(
        self, ids: torch.Tensor, batch: Batch, select: torch.Tensor | None, cache: PagedKVCache
    ) -> torch.Tensor:
        """ids [T] int64, select [S] int64 (rows whose logits are wanted; None: all, which only
        `ComposedExecutor` takes) -> [S, vocab] float32."""
        ...


def _packed(weights: Mapping[str, Weight], name: str) -> PackedWeight:
    weight = weights[name]
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{name} must be a packed weight here, got a dense {weight.dtype} tensor")
    return weight


def _dense(weights: Mapping[str, Weight], name: str) -> torch.Tensor:
    weight = weights[name]
    if isinstance(weight, PackedWeight):
        raise TypeError(f"{name} must be dense, got a packed weight")
    return weight


def _vector(weights: Mapping[str, Weight], name: str | None) -> torch.Tensor | None:
    return None if name is None else _dense(weights, name)


def column_orders(weights: Mapping[str, Weight]) -> dict[str, str]:
    """For every act-order weight the first one of the same order: what `lower` asks for."""
    first: dict[bytes, str] = {}
    orders: dict[str, str] = {}
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight) and weight.perm is not None:
            orders[name] = first.setdefault(weight.perm.cpu().numpy().tobytes(), name)
    return orders


def _sorted_columns(weights: Mapping[str, Weight], step: Linear) -> PackedWeight:
    """The packed weight of a step as kernels see it, whose activations come in its own order.
    Raises ValueError for a program that was lowered for another order.
    """
    weight = _packed(weights, step.weight)
    if step.order is None:
        if weight.perm is not None:
            raise ValueError(f"{step.weight} has its columns in act-order; `lower` was not told")
        return weight
    perm = _packed(weights, step.order).perm
    if weight.perm is None or perm is None or not torch.equal(weight.perm, perm):
        raise ValueError(f"{step.weight} does not have the column order of {step.order}")
    return replace(weight, perm=None)


class ComposedExecutor:
    """One torch op per step: runs on every backend and device, dense matrices included.

    dtype: of the registers. Logits leave in float32, after a rounding to dtype where the last
    matrix takes float activations. The host reads nothing that a device computes, and makes no
    tensors, so that a call on fixed ones can be captured in a CUDA graph.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        weights: Mapping[str, Weight],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.steps = tuple(steps)
        self.weights = weights
        self.dtype = dtype
        self._linears = {
            step.weight: _sorted_columns(weights, step)
            for step in steps
            if isinstance(step, Linear) and isinstance(weights[step.weight], PackedWeight)
        }

    def __call__(
        self, ids: torch.Tensor, batch: Batch, select: torch.Tensor | None, cache: PagedKVCache
    ) -> torch.Tensor:
        floats: dict[str, torch.Tensor] = {}
        acts: dict[str, ops.QuantAct] = {}
        for step in self.steps:
            self._run(step, floats, acts, ids, batch, select, cache)
        return floats[writes(self.steps[-1])[0]].float()

    def _run(
        self,
        step: Step,
        floats: dict[str, torch.Tensor],
        acts: dict[str, ops.QuantAct],
        ids: torch.Tensor,
        batch: Batch,
        select: torch.Tensor | None,
        cache: PagedKVCache,
    ) -> None:
        match step:
            case Embed():
                table = self.weights[step.weight]
                if isinstance(table, PackedWeight):
                    floats[step.dst] = ops.embedding(
                        ids, table, self.dtype, multiplier=step.multiplier
                    )
                else:
                    rows = torch.nn.functional.embedding(ids, table).float()
                    rows = rows * step.multiplier if step.multiplier != 1.0 else rows
                    floats[step.dst] = rows.to(self.dtype)
            case Input():
                floats[step.dst] = ids
            case Output():
                out = floats[step.src]
                out = out if step.add is None else out + floats[step.add]
                floats[step.dst] = out if select is None else out.index_select(0, select)
            case Norm():
                self._norm(step, floats, acts)
            case Linear():
                weight, bias = self._linears.get(step.weight), _vector(self.weights, step.bias)
                dtype = torch.float32 if step is self.steps[-1] else self.dtype
                if weight is None:
                    dense = _dense(self.weights, step.weight)
                    x = floats[step.src].to(dense.dtype)  # they compute in their own dtype
                    y = torch.nn.functional.linear(x, dense)
                    floats[step.dst] = (y if bias is None else y.float() + bias).to(dtype)
                elif step.act_group:
                    floats[step.dst] = ops.linear_quant(acts[step.src], weight, bias, dtype)
                else:
                    floats[step.dst] = ops.linear(floats[step.src], weight, bias, act="float")
            case KvAppend():
                t = floats[step.q].shape[0]
                rotated = ops.kv_append(
                    floats[step.q].view(t, step.q_heads, step.head_dim),
                    floats[step.k].view(t, step.kv_heads, step.head_dim),
                    floats[step.v].view(t, step.kv_heads, step.head_dim),
                    _vector(self.weights, step.rope),
                    None,
                    batch.query_start,
                    batch.kv_len,
                    batch.page_table,
                    *cache.layer(step.layer),
                )
                floats[step.dst] = rotated.view(t, -1)
            case Attention():
                t = floats[step.q].shape[0]
                out = ops.attention(
                    floats[step.q].view(t, step.q_heads, step.head_dim),
                    batch.query_start,
                    batch.kv_len,
                    batch.page_table,
                    *cache.layer(step.layer),
                    scale=step.scale,
                    causal=True,
                    window=step.window,
                    softcap=step.softcap,
                )
                floats[step.dst] = out.view(t, -1)
            case Gate():
                up = None if step.up is None else floats[step.up]
                if step.act_group:
                    acts[step.dst] = ops.gate_quant(
                        floats[step.gate], up, step.activation, act_group=step.act_group
                    )
                else:
                    floats[step.dst] = ops.gate(floats[step.gate], up, step.activation)
            case Select():
                every = floats[step.src]
                floats[step.dst] = every if select is None else every.index_select(0, select)
            case Quantize():
                acts[step.dst] = ops.quantize_act(floats[step.src], step.act_group)
            case Permute():
                perm = _packed(self.weights, step.order).perm
                assert perm is not None
                floats[step.dst] = floats[step.src].index_select(1, perm)

    def _norm(
        self, step: Norm, floats: dict[str, torch.Tensor], acts: dict[str, ops.QuantAct]
    ) -> None:
        x, weight, bias = (
            floats[step.src],
            _vector(self.weights, step.weight),
            _vector(self.weights, step.bias),
        )
        assert weight is not None
        if step.heads:
            rows = x.view(x.shape[0] * step.heads, -1)
            floats[step.dst] = ops.norm(rows, weight, bias, eps=step.eps, center=step.center).view(
                x.shape
            )
            return
        eps, center, group = step.eps, step.center, step.act_group
        if step.add is None:
            if group:
                acts[step.dst] = ops.norm_quant(x, weight, bias, eps, center, act_group=group)
            else:
                floats[step.dst] = ops.norm(x, weight, bias, eps, center)
        elif group:
            acts[step.dst], floats[step.add] = ops.add_norm_quant(
                x, floats[step.add], weight, bias, eps, center, act_group=group
            )
        else:
            floats[step.dst], floats[step.add] = ops.add_norm(
                x, floats[step.add], weight, bias, eps, center
            )


_OPCODES = {
    kind: code
    for code, kind in enumerate(
        (
            Embed,
            Norm,
            Linear,
            KvAppend,
            Attention,
            Gate,
            Select,
            Quantize,
            Permute,
            Input,
            Output,
        ),
        start=1,
    )
}
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu")  # order of enum Activation in csrc/args.h


class NativeExecutor:
    """The whole program in one call of `decoder_step`. Needs packed weights and the CPU kernels.

    namespace: the op namespace that implements the step.
    """

    def __init__(
        self, steps: Sequence[Step], weights: Mapping[str, Weight], namespace: str = "qkernels"
    ) -> None:
        ops = getattr(torch.ops, namespace)
        encoder = _Encoder(weights)
        for step in steps:
            encoder.add(step)
        self.vocab = encoder.width[writes(steps[-1])[0]]
        registers = [n for pair in encoder.registers for n in pair]
        self._plan = ops.decoder_plan(encoder.tensors, registers, encoder.code, encoder.numbers)
        self._step = ops.decoder_step.default
        weakref.finalize(self, ops.decoder_plan_free, self._plan)
        use_huge_pages(encoder.tensors)

    def __call__(
        self, ids: torch.Tensor, batch: Batch, select: torch.Tensor | None, cache: PagedKVCache
    ) -> torch.Tensor:
        return self._step(
            self._plan,
            ids,
            batch.query_start,
            batch.kv_len,
            batch.page_table,
            select,
            self.vocab,
            cache.k_pages,
            cache.v_pages,
            cache.k_scale,
            cache.v_scale,
        )


class _Encoder:
    """Steps as integers; csrc/cpu/decoder_step.cpp reads them back and checks every one."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        # Aliases: a plan keeps pointers, which `tensor.data = other` would leave dangling.
        self.tensors: list[torch.Tensor | None] = []
        self.registers: list[tuple[int, int]] = []  # width, activation group
        self.code: list[int] = []
        self.numbers: list[float] = []
        self.width: dict[str, int] = {}
        self._index: dict[str, int] = {}
        self._base: dict[str, int] = {}

    def _write(self, name: str, width: int, group: int = 0) -> int:
        if name not in self._index:
            self._index[name] = len(self.registers)
            self.registers.append((width, group))
            self.width[name] = width
        return self._index[name]

    def _read(self, name: str | None) -> int:
        return -1 if name is None else self._index[name]

    def _number(self, value: float) -> int:
        self.numbers.append(value)
        return len(self.numbers) - 1

    def _tensor(self, name: str | None) -> int:
        vector = _vector(self.weights, name)
        if vector is None:
            return -1
        assert name is not None
        if name not in self._base:
            self._base[name] = len(self.tensors)
            self.tensors.append(vector.detach())
        return self._base[name]

    def _order(self, name: str) -> int:
        perm = _packed(self.weights, name).perm
        assert perm is not None
        key = f"{name}:perm"
        if key not in self._base:
            self._base[key] = len(self.tensors)
            self.tensors.append(perm)
        return self._base[key]

    def _weight(self, name: str, weight: PackedWeight) -> list[int]:
        *tensors, bits, group, n, k = weight.op_args()
        if name not in self._base:
            self._base[name] = len(self.tensors)
            self.tensors += [None if t is None else t.detach() for t in tensors]
        return [self._base[name], bits, group, n, k]

    def add(self, step: Step) -> None:
        code: list[int]
        match step:
            case Embed():
                table = _packed(self.weights, step.weight)
                if table.perm is not None:
                    raise ValueError(f"{step.weight}: a table in act-order runs op by op only")
                operands = self._weight(step.weight, table)
                code = [self._write(step.dst, table.k), *operands, self._number(step.multiplier)]
            case Input():
                code = [self._write(step.dst, step.width)]
            case Output():
                dst = self._write(step.dst, self.width[step.src])
                code = [dst, self._read(step.src), self._read(step.add)]
            case Norm():
                dst = self._write(step.dst, self.width[step.src], step.act_group)
                code = [
                    dst,
                    self._read(step.src),
                    self._tensor(step.weight),
                    self._tensor(step.bias),
                ]
                code += [self._read(step.add), self._number(step.eps), int(step.center), step.heads]
            case Linear():
                weight = _sorted_columns(self.weights, step)
                operands = self._weight(step.weight, weight)
                code = [
                    self._write(step.dst, weight.n),
                    self._read(step.src),
                    *operands,
                    self._tensor(step.bias),
                ]
            case KvAppend():
                dst = self._write(step.dst, self.width[step.q])
                code = [dst, self._read(step.q), self._read(step.k), self._read(step.v), step.layer]
                code += [step.q_heads, step.kv_heads, step.head_dim, self._tensor(step.rope)]
            case Attention():
                code = [self._write(step.dst, self.width[step.q]), self._read(step.q), step.layer]
                code += [step.q_heads, step.kv_heads, step.head_dim, self._number(step.scale)]
                code += [step.window, self._number(step.softcap)]
            case Gate():
                dst = self._write(step.dst, self.width[step.gate], step.act_group)
                code = [
                    dst,
                    self._read(step.gate),
                    self._read(step.up),
                    _ACTIVATIONS.index(step.activation),
                ]
            case Select():
                code = [self._write(step.dst, self.width[step.src]), self._read(step.src)]
            case Quantize():
                code = [
                    self._write(step.dst, self.width[step.src], step.act_group),
                    self._read(step.src),
                ]
            case Permute():
                dst = self._write(step.dst, self.width[step.src])
                code = [dst, self._read(step.src), self._order(step.order)]
        self.code += [_OPCODES[type(step)], *code]
