"""Packed layers under transformers' tensor parallelism.

transformers splits the parameters of a layer as DTensors along a dimension. The packed layout is no
matrix of numbers, so here each rank makes the whole packed weight and keeps its own rows or columns
of it, which are a packed weight again: every rank has the codes and scales that one process has.
What goes around a layer (who has which part of x, and the sum over ranks) is left to the style that
the model's plan names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from ..nn.keep import _TENSORS, HoldsPacked
from ..nn.linear import QuantLinear
from ..ops.linear import default_act_group
from ..quant import PackedWeight
from ..quant.spec import BLOCK, UNIT_COLS
from ..quant.weight import UNIT_ROWS

# The dimension of [N, K] that a style splits; None: every rank has all of it.
_DIMENSIONS: dict[str, int | None] = {
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "rowwise_rep": 1,
    "rowwise_split_input": 1,
    "replicate": None,
    "replicated_with_grad_allreduce": None,
    "embedding_rowwise": None,
    "embedding_colwise": None,
}
_PREFIX = "qkernels_"


@dataclass(frozen=True)
class Split:
    """What a rank keeps of a weight [n, k]: [start, stop) of its rows (dimension 0) or columns."""

    dimension: int
    start: int
    stop: int

    def of(self, packed: PackedWeight) -> PackedWeight:
        """A copy of that part, exactly. Rows need not fall on blocks of 64: then they are packed
        anew."""
        start, stop = self.start, self.stop
        if self.dimension == 1:
            return packed.slice_cols(start, stop)
        if start % UNIT_ROWS == 0 and (stop % UNIT_ROWS == 0 or stop == packed.n):
            part = packed.slice_rows(start, stop)
            # Not a view, which would keep the whole weight.
            own = {
                name: t.clone() if name not in ("table", "perm") else t
                for name, t in part.tensors().items()
            }
            return replace(part, **own)
        return packed.unpack().rows(start, stop).pack()

    def shape(self, n: int, k: int) -> tuple[int, int]:
        size = self.stop - self.start
        return (size, k) if self.dimension == 0 else (n, size)


class PackedStyle(TensorParallelLayer):
    """A style of transformers that splits packed layers our way, and leaves others to it."""

    def __init__(self, name: str) -> None:
        self._name, self._inner = name, ALL_PARALLEL_STYLES[name]

    def validate_param(
        self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None
    ) -> None:
        if not isinstance(module, HoldsPacked):
            self._inner.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not isinstance(module, HoldsPacked):
            self._inner.shard_param(module, param, mesh)
            return
        dimension = self._dimension(module)
        bias = module._parameters.get("bias")
        if param != "bias" or dimension is None or bias is None:
            return
        if dimension == 1 and module.float_dtype is not None:
            # transformers adds it after the sum over ranks, to rows of the model's type.
            module._parameters["bias"] = nn.Parameter(bias.to(module.float_dtype), False)
        self._inner.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> Any:
        """Splits a packed layer. Raises ValueError for columns that cannot be split so."""
        if not isinstance(module, HoldsPacked):
            return self._inner.install_forward(module, mesh)
        dimension = self._dimension(module)
        if dimension is None:
            return module
        _split(module, dimension, mesh.get_local_rank(), mesh.size())
        module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
        return self._inner.install_forward(module, mesh)

    def _dimension(self, module: HoldsPacked) -> int | None:
        if self._name not in _DIMENSIONS:
            raise ValueError(
                f"tensor parallelism: the style {self._name!r} of {_path(module)} is not known "
                f"for packed layers; known are {', '.join(_DIMENSIONS)}"
            )
        # Tied to a table, of which every rank has all.
        whole = not isinstance(module, QuantLinear) or getattr(module, "_qkernels_tied", False)
        return None if whole else _DIMENSIONS[self._name]


def _path(module: HoldsPacked) -> str:
    return str(getattr(module, "_qkernels_path", type(module).__name__))


def _split(module: HoldsPacked, dimension: int, rank: int, ranks: int) -> None:
    n, k, spec = module._n, module._k, module.spec
    total = (n, k)[dimension]
    size = -(-total // ranks)  # the last rank may have fewer, as torch.chunk has it
    group = spec.group(k)
    if dimension == 1:
        step = BLOCK if spec.two_level else UNIT_COLS if spec.group_size == -1 else group
        if spec.act_order:
            raise ValueError(
                f"tensor parallelism: {_path(module)} is in act-order, where groups take columns "
                f"from everywhere: its K = {k} cannot be split over {ranks} ranks"
            )
        if size % step:
            raise ValueError(
                f"tensor parallelism: {_path(module)} has K = {k}, over {ranks} ranks {size} per "
                f"rank, which is no multiple of {step}, the columns that share a scale ({spec}); "
                "take another group_size or number of ranks"
            )
    if size * (ranks - 1) >= total:
        raise ValueError(
            f"tensor parallelism: {_path(module)} has {'NK'[dimension]} = {total}, of which the "
            f"last of {ranks} ranks would have none"
        )
    part = Split(dimension, rank * size, min((rank + 1) * size, total))
    module._qkernels_split = part  # type: ignore[assignment]
    local = PackedWeight.empty(spec, *part.shape(n, k), device="meta")
    module._n, module._k, module._group, module._kind = local.n, local.k, local.group, local.kind
    if isinstance(module, QuantLinear):
        module._act_group = default_act_group(local)
    for name in _TENSORS:
        module._buffers[name] = getattr(local, name)
    if not module.weight.is_floating_point():
        module.weight = nn.Parameter(local.codes, requires_grad=False)


def local_part(module: HoldsPacked, packed: PackedWeight) -> PackedWeight:
    """What this rank keeps of a weight: all of it, unless the module is split.

    Raises ValueError for a module that a style other than ours has split.
    """
    if isinstance(module.weight, DTensor):
        raise ValueError(
            f"tensor parallelism: {_path(module)} is packed, and a tp_plan of one's own may not "
            "name it"
        )
    split = getattr(module, "_qkernels_split", None)
    return packed if split is None else split.of(packed)


def is_split(model: nn.Module) -> bool:
    """Whether a rank has only a part of the model's packed layers."""
    return any(getattr(module, "_qkernels_split", None) is not None for module in model.modules())


def use_packed_styles(model: Any) -> None:
    """Lets the model's plan split its packed layers our way. Without tensor parallelism nobody
    looks at the plan."""
    plan = model.tp_plan
    for path, module in model.named_modules():
        if not isinstance(module, HoldsPacked):
            continue
        module._qkernels_path = path  # type: ignore[assignment]
        for rule in (replace_layer_number_by_wildcard(path), path):
            style = plan.get(rule)
            if style is None or style.startswith(_PREFIX) or style not in ALL_PARALLEL_STYLES:
                continue
            if _PREFIX + style not in ALL_PARALLEL_STYLES:
                ALL_PARALLEL_STYLES.register(_PREFIX + style, PackedStyle(style))
            plan[rule] = _PREFIX + style
