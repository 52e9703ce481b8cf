"""The quantization method "qkernels" of vLLM: checkpoints by our own readers.

It takes what vLLM's own methods refuse (asymmetric GPTQ, 2 and 3 bits, act-order, ...), by itself,
and everything else of gptq, awq and compressed-tensors for those who ask with
`--quantization qkernels`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from . import METHOD, weights
from .kernels import act_mode
from .layer import compute, hold
from .parameters import make_parameters
from .refusals import reason_of_vllm
from .stored import METHODS, SHAPE, Checkpoint, Header, Stored, rank_columns

logger = init_logger(f"vllm.{METHOD}")

# vLLM's own names of the methods that this one may take over.
_ALIASES = {
    "gptq": ("gptq", "auto_gptq", "gptq_marlin"),
    "awq": ("awq", "auto_awq", "awq_marlin"),
    "compressed-tensors": ("compressed-tensors",),
}


class QKernelsConfig(QuantizationConfig):
    """A gptq, awq or compressed-tensors checkpoint, read by this package.

    raw: its `quantization_config`. Raises ValueError for one that our readers do not support.
    """

    def __init__(self, raw: dict[str, Any] | None = None) -> None:
        super().__init__()
        if raw is None:
            raise ValueError(
                f'--quantization "{METHOD}" needs a checkpoint with a quantization_config of '
                f"{', '.join(METHODS)}; qkernels quantize MODEL OUT writes one"
            )
        self.checkpoint = Checkpoint(raw)

    def __repr__(self) -> str:
        return f"QKernelsConfig({self.checkpoint.method})"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the CUDA and Triton kernels; the CPU has none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QKernelsConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        method = hf_quant_cfg.get("quant_method")
        if user_quant == METHOD:
            Checkpoint(hf_quant_cfg)  # raises for what is not served
            return METHOD
        if method not in METHODS or user_quant not in (None, *_ALIASES[method]):
            return None
        reason = reason_of_vllm(hf_quant_cfg)
        if reason is None:
            return None
        try:
            Checkpoint(hf_quant_cfg)
        except ValueError as error:
            logger.warning("neither vLLM nor qkernels takes this checkpoint: %s; %s", reason, error)
            return None
        logger.info_once("qkernels serves a %s checkpoint that vLLM refuses: %s", method, reason)
        return METHOD

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        found = get_safetensors_params_metadata(model_name, revision=revision)
        self.checkpoint.where = model_name
        self.checkpoint.header = Header.of(found, model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        def rename(name: str) -> str | None:
            return next(iter(hf_to_vllm_mapper.apply_list([name])), None)

        self.checkpoint.rename(rename)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix={f".{SHAPE}": None})

    def paths(self, prefix: str) -> list[str]:
        """The modules of the checkpoint that vLLM fuses into the one at `prefix`."""
        above, _, name = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(name, [name])
        return [f"{above}.{each}" if above else each for each in names]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise ValueError(
                f"qkernels: {prefix} is a layer of experts, which qkernels does not serve in vLLM"
            )
        head = isinstance(layer, VocabParallelEmbedding)
        if not head and not isinstance(layer, LinearBase):
            return None
        # Sizes do not matter for whether it is stored dense.
        paths = self.paths(prefix)
        if self.checkpoint.layer(paths, 64, 1 << 20) is None:
            return None if head else UnquantizedLinearMethod()
        if head:
            named = self.checkpoint.header.shapes
            if not any(
                name.startswith(f"{prefix}.") and name != f"{prefix}.weight" for name in named
            ):
                return None
            raise ValueError(
                f"qkernels: {prefix} is quantized; of tables and heads qkernels serves dense ones "
                "in vLLM"
            )
        return QKernelsLinearMethod(self.checkpoint, paths, prefix)


@register_weight_loader_v2_supported_method
class QKernelsLinearMethod(LinearMethodBase):
    """A linear layer whose tensors are loaded as the checkpoint has them, on the CPU, and packed
    after that."""

    requires_device_loading = False  # the packed ones alone go to the device

    def __init__(self, checkpoint: Checkpoint, paths: list[str], prefix: str) -> None:
        self.checkpoint, self.paths, self.prefix = checkpoint, paths, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        stored = self._stored_as(n, k)
        self._ranks = input_size // k
        # A rank's columns of an act-order matrix are of all groups: cut after loading.
        self._whole = stored.act_order and self._ranks > 1
        if self._whole:
            stored = self._stored_as(n, input_size)
        else:
            weights.check_split(self.prefix, k, stored.group_size, input_size)
        self._stored, self._act = stored, act_mode()
        self._device = torch.get_default_device()
        made = make_parameters(
            stored,
            output_partition_sizes,
            self._ranks > 1 and not self._whole,
            extra["weight_loader"],
            self.prefix,
        )
        for name, parameter in made.items():
            layer.register_parameter(name, parameter)

    def _stored_as(self, n: int, k: int) -> Stored:
        stored = self.checkpoint.layer(self.paths, n, k)
        assert stored is not None  # or this would not be its method
        return replace(stored, group_size=-1) if stored.group_size >= k else stored

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        stored = self._stored
        tensors = {name: getattr(layer, name).detach().as_subclass(Tensor) for name in stored.parts}
        columns = None
        with torch.device("cpu"):
            matrix = self.checkpoint.open(stored, tensors)
            if self._whole:
                rank: Any = layer.tp_rank
                weight, columns = rank_columns(matrix, rank, self._ranks)
            else:
                weight = weights.packed(matrix)
        hold(layer, stored.names, weight.to(self._device), self._act, columns)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return compute(layer, x, bias)
