"""Parameters for the tensors that a checkpoint stores, of vLLM's classes, which know how to load a
rank's part of them and of what is fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from .stored import Stored
from .weights import NoKernel


def make_parameters(
    stored: Stored,
    widths: Sequence[int],
    split: bool,
    load: Callable[..., None],
    what: str,
) -> dict[str, nn.Parameter]:
    """A parameter on the CPU for every tensor of a rank's part [n, k].

    widths: rows of each of the fused matrices, n in all. split: whether the rank has some columns
    of the layer only. load: the layer's `weight_loader`. Floats are loaded as float32, which loses
    nothing of theirs. Raises NoKernel where a part does not begin at a whole int32 word.
    """
    made = {}
    for name, part in stored.parts.items():
        dims, shape = stored.dims[name], part.shape
        if len(shape) != 2 and dims.rows is not None:
            raise NoKernel(f"qkernels: {what}: {name} is one for the whole tensor, not per row")
        floats = part.dtypes[0].is_floating_point
        data = torch.zeros(shape, dtype=torch.float32 if floats else part.dtypes[-1], device="cpu")
        if dims.rows is None:
            made[name] = _group_index(data, what, name)
            continue
        # A scale for the whole row is the same for every rank's columns.
        of_groups = name not in ("qweight", "weight", "weight_packed")
        split_here = split and not (of_groups and stored.group_size == -1)
        options: dict[str, Any] = {
            "data": data,
            "output_dim": dims.rows,
            "weight_loader": _two_dimensional(load),
        }
        if split_here:
            options["input_dim"] = dims.columns
        if dims.packed is None:
            kind = GroupQuantScaleParameter if split_here else ChannelQuantScaleParameter
        else:
            kind = PackedvLLMParameter if split_here else PackedColumnParameter
            factor = Fraction(32, stored.bits)
            sizes = list(widths) if dims.packed == dims.rows else [stored.k]
            parts = len(widths) > 1 if dims.packed == dims.rows else split_here
            _check_words(what, name, sizes, factor, parts)
            options |= {
                "packed_dim": dims.packed,
                "packed_factor": factor.numerator if factor.denominator == 1 else factor,
            }
        made[name] = kind(**options)
    return made


def _check_words(what: str, name: str, sizes: list[int], factor: Fraction, parts: bool) -> None:
    for size in sizes if parts else ():
        if (size / factor).denominator != 1:
            raise NoKernel(
                f"qkernels: {what}: {name} has {factor} codes in an int32, and a part of {size} "
                "is not whole ones: lower tensor_parallel_size"
            )


def _two_dimensional(load: Callable[..., None]) -> Callable[..., None]:
    def loader(param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        load(param, loaded[:, None] if loaded.dim() == 1 else loaded, *args, **kwargs)

    return loader


def _group_index(data: Tensor, what: str, name: str) -> nn.Parameter:
    """The group of every column [k]: whole on every rank, and the same for all that is fused."""
    data.fill_(-1)

    def loader(param: nn.Parameter, loaded: Tensor, *_: Any, **__: Any) -> None:
        if loaded.shape != param.shape:
            raise ValueError(
                f"qkernels: {what}: {name} must be {list(param.shape)}, got {list(loaded.shape)}"
            )
        if bool((param.data >= 0).any()) and not torch.equal(param.data, loaded.to(param.dtype)):
            raise NoKernel(
                f"qkernels: {what}: vLLM fuses matrices there, but their columns are in different "
                f"orders ({name})"
            )
        param.data.copy_(loaded)

    return BasevLLMParameter(data=data, weight_loader=loader)
