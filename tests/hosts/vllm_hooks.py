"""The plugin against the interfaces of the vLLM that is installed; `vllm.sh` runs it."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear as tables
from vllm.model_executor.kernels.linear import Int8ScaledMMLinearLayerConfig, MPLinearLayerConfig
from vllm.model_executor.layers import quantization
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import ScalarType, scalar_types

from qkernels import vllm as plugin
from qkernels.vllm import hooks
from qkernels.vllm.config import QKernelsConfig
from qkernels.vllm.kernels import QKernelsInt8LinearKernel, QKernelsLinearKernel, act_mode
from qkernels.vllm.parameters import _check_words
from qkernels.vllm.refusals import reason_of_vllm
from qkernels.vllm.weights import NoKernel

GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
    "checkpoint_format": "gptq",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(format: str = "pack-quantized", inputs: Any = None, **weights: Any) -> Any:
    values = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
    }  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": {**values, **weights},
        "input_activations": inputs,
        "output_activations": None,
        "format": format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PER_TOKEN = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip


def test_the_plugin_registers_once_and_first() -> None:
    plugin.register()
    hooks.install()
    for name, kernel in (
        ("_POSSIBLE_KERNELS", QKernelsLinearKernel),
        ("_POSSIBLE_INT8_KERNELS", QKernelsInt8LinearKernel),
    ):
        for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
            row = getattr(tables, name)[platform]
            assert row[0] is kernel and row.count(kernel) == 1 and len(row) > 1
    assert quantization.get_quantization_config("qkernels") is QKernelsConfig
    assert quantization.QUANTIZATION_METHODS.count("qkernels") == 1


def test_a_table_that_is_gone_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tables, "_POSSIBLE_INT8_KERNELS")
    with pytest.raises(AttributeError, match="linear has no _POSSIBLE_INT8_KERNELS, a table from"):
        hooks.install()


def test_a_method_that_another_plugin_has_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(hooks._custom(), "qkernels", dict)
    with pytest.raises(ValueError, match="'qkernels' of vLLM belongs to <class 'dict'> already"):
        hooks.install()


def test_the_variable_switches_the_plugin_off() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.model_executor.kernels import linear as t;"
        "print([k.__name__ for k in t._POSSIBLE_KERNELS.popitem()[1]])"
    )
    for value, there in (("0", False), ("1", True)):
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.environ['QKERNELS_VLLM'] = {value!r}; {code}"],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert ("QKernelsLinearKernel" in done.stdout) == there


def config(kind: ScalarType, group: int = 32, k: int = 64, **more: Any) -> MPLinearLayerConfig:
    given: dict[str, Any] = {
        "full_weight_shape": (64, 128), "partition_weight_shape": (k, 128), "weight_type": kind,
        "act_type": torch.bfloat16, "group_size": group, "zero_points": kind.bias == 0,
    }  # fmt: skip
    return MPLinearLayerConfig(**{**given, **more})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (config(scalar_types.uint4b8), None),
        (config(scalar_types.uint4), None),
        (config(scalar_types.uint8b128, -1), None),
        (config(scalar_types.uint8), None),
        (config(scalar_types.uint3b4), None),
        (config(scalar_types.uint6, act_type=torch.float32), None),
        (config(scalar_types.uint7b64), "qkernels has weights of 2, 3, 4, 5, 6, 8 bits, not of 7"),
        (config(scalar_types.uint4, zero_points=False), "not less 0 with no zero points"),
        (config(scalar_types.uint4b8, 8), "groups of a multiple of 16 columns, not of 8"),
        (config(scalar_types.int4), "unsigned integers as weights, not int4"),
        (config(scalar_types.float8_e4m3fn), "unsigned integers as weights, not float8"),
        (config(scalar_types.uint4b8, act_type=torch.int8), "float16 or bfloat16, not torch.int8"),
    ],
    ids=str,
)
def test_which_weights_are_taken(given: MPLinearLayerConfig, reason: str | None) -> None:
    can, said = QKernelsLinearKernel.can_implement(given)
    assert can == (reason is None)
    assert (said is None) if reason is None else reason in str(said)


def test_ranks_that_split_a_group_are_one_clear_error() -> None:
    with pytest.raises(NoKernel, match=r"has 32 input columns on this rank \(64 of the layer over"):
        QKernelsLinearKernel.can_implement(config(scalar_types.uint4b8, 64, 32))
    with pytest.raises(NoKernel, match="qkv: qzeros has 32/3 codes in an int32, and a part of 40"):
        _check_words("qkv", "qzeros", [64, 40], Fraction(32, 3), True)
    _check_words("qkv", "qzeros", [64, 32], Fraction(32, 3), True)


@pytest.mark.parametrize(
    ("static", "symmetric", "reason"),
    [(False, True, None), (True, True, "static"), (False, False, "no zero points")],
)
def test_which_int8_layers_are_taken(static: bool, symmetric: bool, reason: str | None) -> None:
    given = Int8ScaledMMLinearLayerConfig(
        is_channelwise=True, is_static_input_scheme=static, input_symmetric=symmetric
    )
    assert QKernelsInt8LinearKernel.is_supported() == (True, None)
    can, said = QKernelsInt8LinearKernel.can_implement(given)
    assert can == (reason is None)
    assert (said is None) if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (GPTQ, None),
        ({**GPTQ, "bits": 8}, "uint8b128" if current_platform.is_cpu() else None),
        ({**GPTQ, "sym": False}, "sym=False"),
        ({**GPTQ, "bits": 3}, "bits=3"),
        ({**GPTQ, "desc_act": True}, "desc_act"),
        ({**GPTQ, "group_size": 16}, "group_size"),
        (AWQ, None),
        ({**AWQ, "zero_point": False}, "without zero points"),
        (compressed(), None),
        (compressed(symmetric=False), None),
        (compressed(actorder="group"), "actorder"),
        (
            compressed("int-quantized", PER_TOKEN, num_bits=8, strategy="channel", group_size=None),
            None,
        ),
        (
            compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
            "int-quantized without quantized activations",
        ),
        (compressed(inputs=PER_TOKEN), "pack-quantized with quantized activations"),
    ],
    ids=str,
)
def test_what_vllm_refuses_is_taken_over(raw: dict[str, Any], reason: str | None) -> None:
    said = reason_of_vllm(raw)
    assert (said is None) if reason is None else reason in str(said)
    takes = QKernelsConfig.override_quantization_method
    own = raw["quant_method"]
    assert takes(raw, None) == takes(raw, own) == (None if reason is None else "qkernels")
    assert takes(raw, "qkernels") == "qkernels"  # who asks for it
    assert takes(raw, "fp8") is None


def test_what_nobody_takes_is_left_to_vllm_or_an_error_for_who_asked() -> None:
    fp8 = {"quant_method": "fp8"}
    takes = QKernelsConfig.override_quantization_method
    assert takes(fp8, None) is None
    with pytest.raises(ValueError, match="quant_method 'fp8' is not served in vLLM; served are"):
        takes(fp8, "qkernels")
    marlin = {**GPTQ, "sym": False, "is_marlin_format": True}
    assert takes(marlin, None) is None
    with pytest.raises(ValueError, match="the Marlin layout is not supported"):
        takes(marlin, "qkernels")
    with pytest.raises(ValueError, match="needs a checkpoint with a quantization_config"):
        QKernelsConfig()


def test_the_activations_are_an_option() -> None:
    assert act_mode() == "auto"
    with set_current_vllm_config(VllmConfig(additional_config={"qkernels_act": "float"})):
        assert act_mode() == "float"
    with (
        set_current_vllm_config(VllmConfig(additional_config={"qkernels_act": "int4"})),
        pytest.raises(
            ValueError, match="qkernels_act must be one of auto, int8, float, got 'int4'"
        ),
    ):
        act_mode()
