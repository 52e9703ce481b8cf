"""What vLLM's own quantization methods do not serve, asked of them where they can be asked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform


def reason_of_vllm(raw: Mapping[str, Any]) -> str | None:
    """Why vLLM does not serve a checkpoint with this `quantization_config`; None if it does, as far
    as can be told without the model."""
    method = raw["quant_method"]
    if method == "awq" and raw.get("zero_point") is False:
        return "AWQ without zero points: it would take the codes for values"
    if method == "compressed-tensors":
        for name, group in (raw.get("config_groups") or {}).items():
            reason = _compressed_tensors(raw, group)
            if reason is not None:
                return f"config_groups.{name}: {reason}"
    try:
        config: Any = get_quantization_config(method).from_config(copy.deepcopy(dict(raw)))
        if method == "gptq":
            from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod

            AutoGPTQLinearMethod(config)  # looks at the types and group sizes of the platform
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def _compressed_tensors(raw: Mapping[str, Any], group: Mapping[str, Any]) -> str | None:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    stored = group.get("format") or raw.get("format")
    if weights.get("type", "int") != "int":
        return None
    if stored in ("int-quantized", "naive-quantized"):
        if not inputs:
            return f"{stored} without quantized activations"
        if weights.get("symmetric", True) is False:
            return f"{stored} with zero points"
    if stored == "pack-quantized" and inputs and current_platform.is_cpu():
        return "pack-quantized with quantized activations, which its CPU kernels lack"
    return None
