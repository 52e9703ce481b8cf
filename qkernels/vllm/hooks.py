"""The places of vLLM that the plugin hooks into, all of them here.

Public: `register_linear_kernel`, `register_quantization_config`, both of which add at the end.
Private: the tables of kernels, to be first in them.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.kernels import linear as tables
from vllm.model_executor.layers import quantization
from vllm.platforms import PlatformEnum

from . import METHOD
from .config import QKernelsConfig
from .kernels import QKernelsInt8LinearKernel, QKernelsLinearKernel

# Kind of kernel -> our class, and the table that it stands in: platform -> classes, the first that
# can serves.
_KERNELS = {
    "mp": (QKernelsLinearKernel, "_POSSIBLE_KERNELS"),
    "int8": (QKernelsInt8LinearKernel, "_POSSIBLE_INT8_KERNELS"),
}
_PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA)


def install() -> None:
    """All or nothing: raises AttributeError, before anything is changed, where vLLM lacks one of
    the tables, and ValueError where another class has our method's name."""
    found = {kind: _table(name) for kind, (_, name) in _KERNELS.items()}
    _free(METHOD)
    for kind, (kernel, _) in _KERNELS.items():
        for platform in _PLATFORMS:
            table = found[kind].setdefault(platform, [])
            if kernel not in table:
                tables.register_linear_kernel(kernel, platform, kind)
                table.insert(0, table.pop(table.index(kernel)))
    if QKernelsConfig is not _custom().get(METHOD):
        quantization.register_quantization_config(METHOD)(QKernelsConfig)


def _table(name: str) -> dict[Any, list[type]]:
    table = getattr(tables, name, None)
    if not isinstance(table, dict) or not all(isinstance(row, list) for row in table.values()):
        raise AttributeError(
            f"qkernels: {tables.__name__} has no {name}, a table from platforms to lists of "
            "kernels, in which our kernels would stand first"
        )
    return table


def _custom() -> dict[str, type]:
    return getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})


def _free(method: str) -> None:
    taken = _custom().get(method)
    if taken not in (None, QKernelsConfig):
        raise ValueError(
            f"qkernels: the quantization method {method!r} of vLLM belongs to {taken!r} already"
        )
