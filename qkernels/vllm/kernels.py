"""Our linear as kernels of vLLM's own quantization methods: these make and load the parameters,
which are packed anew after loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform

from ..ops.linear import resolve_act
from ..quant import QuantSpec
from ..quant.spec import FLAT_SCALES
from . import METHOD, weights
from .layer import Names, act_option, compute, hold


def act_mode() -> str:
    """The option of the vLLM that is being configured. vLLM hashes it into the key of its compiled
    graphs, as it must: the mode is a constant there."""
    config = get_current_vllm_config_or_none()
    return act_option(None if config is None else config.additional_config)


def _plain(parameter: Any, rows_first: bool = True) -> Tensor:
    """The matrix in a parameter of vLLM, its rows (of the weight) first or last."""
    tensor = parameter.detach().as_subclass(Tensor)
    return tensor if (parameter.output_dim == 0) == rows_first else tensor.t()


class QKernelsLinearKernel(MPLinearKernel):
    """Weights of 2, 3, 4, 5, 6 and 8 bits with a scale per group or row, zero points or not."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # `can_implement` looks at the GPU itself

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        kind = c.weight_type
        if not kind.is_integer() or kind.is_signed():
            return False, f"{METHOD} has unsigned integers as weights, not {kind}"
        if getattr(c, "has_g_idx", False):  # of older versions
            return False, f'{METHOD} takes act-order with --quantization "{METHOD}"'
        bits = kind.size_bits
        reason = weights.reason_against(bits, kind.bias, c.zero_points, c.group_size)
        if reason is None and c.act_type not in FLAT_SCALES.values():
            reason = f"has activations in float32, float16 or bfloat16, not {c.act_type}"
        if reason is not None:
            return False, f"{METHOD} {reason}"
        k, full_k = c.partition_weight_shape[0], c.full_weight_shape[0]
        weights.check_split("a layer", k, c.group_size, full_k)
        device = current_platform.device_type
        scale = {dtype: name for name, dtype in FLAT_SCALES.items()}[c.act_type]
        group = c.group_size if c.group_size < k else -1
        spec = QuantSpec(bits, group, scale, "integer" if c.zero_points else "symmetric")
        act = resolve_act(act_mode(), torch.device(device))
        reason = weights.reason_on(device, spec, k, act)
        return reason is None, reason and f"{METHOD} {reason}"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._act = act_mode()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        codes, scale, zero = self._get_weight_params(layer)
        if codes.packed_dim != codes.input_dim:
            raise ValueError(
                f"qkernels: {self.w_q_name} must be packed along its columns, it is along its rows"
            )
        words = None
        if self.config.zero_points:
            assert zero is not None and zero.packed_dim == zero.output_dim
            words = _plain(zero, rows_first=False)
        matrix = weights.words_matrix(
            _plain(codes),
            _plain(scale),
            words,
            k=self.config.partition_weight_shape[0],
            bits=self.config.weight_type.size_bits,
            group_size=self.config.group_size,
        )
        names = Names(self.w_q_name, self.w_s_name, self.w_zp_name or "qzeros")
        hold(layer, names, weights.packed(matrix, codes.device), self._act)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return compute(layer, x, bias)


class QKernelsInt8LinearKernel(Int8ScaledMMLinearKernel):
    """W8A8: int8 weights with a scale per row, activations quantized at run time with a scale per
    token."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        spec = QuantSpec(8, -1, "float32")
        reason = weights.reason_on(current_platform.device_type, spec, 64, "int8")
        return reason is None, reason and f"{METHOD} {reason}"

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if c.is_static_input_scheme:
            return (
                False,
                f"{METHOD} finds scales of activations at run time, it takes no static ones",
            )
        if not c.input_symmetric:
            return False, f"{METHOD} has no zero points of activations"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, scale, *_ = self._get_layer_params(layer)
        widths: Any = layer.logical_widths
        matrix = weights.int8_matrix(weight.data, scale.data, list(widths))
        w, s, _, zero, _ = self.layer_param_names
        hold(layer, Names(w, s, zero), weights.packed(matrix, weight.device), "int8")

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return compute(layer, x, bias)
