"""`from_pretrained(..., quantization_config=QKernelsConfig(...))`: transformers' linear layers on
packed weights, quantized while they are loaded, or read from a checkpoint that has them so.

One quantizer serves every case. What differs is where the formats of the layers come from, and how
the tensors of a layer become its packed weight: that is a `loading.Loader`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config
from transformers.quantizers.auto import register_quantizer as _register
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import CheckpointError
from ..convert import dequantize_
from ..convert.plan import Overrides, Request, Scheme
from ..nn.keep import HoldsPacked
from ..nn.linear import QuantLinear
from ..quant import QuantSpec
from ..quant.quantize import check_algo
from . import parallel
from .loading import Checkpoint, Loader, Quantize, Stored
from .stored import METHOD, NOTE, describe, saved


class QKernelsConfig(QuantizationConfigMixin):
    """Which layers `from_pretrained` quantizes, and how: the arguments of `qk.quantize_`.

    spec: a scheme ("W4A16", "W8A8", "MXFP4", ...) or a QuantSpec. group_size: columns per scale,
    for a scheme. algo: "auto", "rtn" or "hqq". modules_to_not_convert: names, or parts of paths, of
    modules that stay dense. overrides: {regular expression: scheme, QuantSpec or None}. embeddings:
    a scheme or QuantSpec for the tables of embeddings. act: "int8" quantizes activations at run
    time, "float" does not, "auto" is what the scheme says.

    Raises ValueError and TypeError for what no format is. A model that was loaded has one of these
    in `config.quantization_config`, with `stored`, which is what config.json says of its layers.
    """

    def __init__(
        self,
        spec: Scheme = "W4A16",
        *,
        group_size: int | None = None,
        algo: str = "auto",
        modules_to_not_convert: Collection[str] = ("lm_head",),
        overrides: Overrides | None = None,
        embeddings: Scheme | None = None,
        act: str = "auto",
    ) -> None:
        self.quant_method: Any = METHOD  # annotated as one of transformers' own
        self.spec, self.group_size, self.algo, self.act = spec, group_size, algo, act
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides, self.embeddings = overrides, embeddings
        self.stored: dict[str, Any] | None = None
        self.request()

    def request(self) -> Request:
        """The arguments, checked."""
        check_algo(self.algo)
        return Request.of(
            self.spec,
            self.group_size,
            self.modules_to_not_convert,
            self.overrides,
            self.embeddings,
            self.act,
        )

    @classmethod
    def of_stored(cls, raw: Mapping[str, Any], act: str | None = None) -> QKernelsConfig:
        """For a checkpoint that is quantized already. raw: its quantization_config. act: of layers
        for which it does not say it."""
        config = cls(act="auto" if act is None else act)
        config.stored = dict(raw)
        return config

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From what config.json holds, or from the arguments by their names."""
        given = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if "layers" in given:
            config = cls.of_stored(config_dict)
        else:
            unknown = sorted(set(given) - set(_ARGUMENTS))
            if unknown:
                raise ValueError(
                    f"QKernelsConfig: unknown {', '.join(unknown)}; known are "
                    f"{', '.join(_ARGUMENTS)}"
                )
            config = cls(**{key: _read(value) for key, value in given.items()})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        return {"quant_method": METHOD, **{key: _plain(getattr(self, key)) for key in _ARGUMENTS}}


_ARGUMENTS = (
    "spec", "group_size", "algo", "modules_to_not_convert", "overrides", "embeddings", "act",
)  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, QuantSpec):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return value if value is None or isinstance(value, str | int) else list(value)


def _read(value: Any) -> Any:
    """The inverse: a mapping with bits is a QuantSpec."""
    if isinstance(value, Mapping):
        if "bits" in value:
            return QuantSpec.from_dict(dict(value))
        return {key: _read(v) for key, v in value.items()}
    return value


class QKernelsQuantizer(HfQuantizer):
    """transformers' hooks. `report`, a `qk.QuantReport`, says what was quantized on load."""

    requires_calibration = False
    quantization_config: QKernelsConfig

    def __init__(self, quantization_config: QKernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config = copy.copy(quantization_config)  # the caller may use his again
        self.report: Any = None
        self._loader: Loader | None = None
        if self.pre_quantized and self.quantization_config.stored is None:
            raise ValueError(
                "qkernels: config.json says how to quantize the model (quant_method "
                f'"{METHOD}"), but not what it holds: it was not written by save_pretrained'
            )

    # Before the weights are loaded.

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        config = self.quantization_config
        files = [Path(file) for file in checkpoint_files or ()]
        if self.pre_quantized:
            with torch.device("cpu"):  # we are called where everything is made on meta
                checkpoint = Checkpoint.of(model, files, config.to_dict())
            self._loader = Stored(model, checkpoint, config.act)
        else:
            self._loader = Quantize(model, config.request(), config.algo)
        return self._prepared(model, device_map)

    def _prepared(self, model: Any, device_map: Any) -> Any:
        assert self._loader is not None
        # With several devices accelerate takes the model over before the first hook where errors
        # could be raised: then transformers reports them, in a table.
        several = isinstance(device_map, Mapping) and len(set(device_map.values())) > 1
        self._loader.keeps_errors = device_map is None or not (
            several or isinstance(device_map, str)
        )
        parallel.use_packed_styles(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return (
            not self.pre_quantized and self._loader is not None and self._loader.takes(param_name)
        )

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element, for `device_map="auto"`: of a weight that is to be quantized, what
        its packed form will take."""
        size = self._loader.nbytes_of(param_name) if self._loader else None
        return param.element_size() if size is None else size / max(1, param.numel())

    def get_quantize_ops(self) -> Any:
        assert isinstance(self._loader, Quantize)
        return self._loader.operation(self)

    def get_weight_conversions(self) -> list[Any]:
        return [] if self._loader is None else self._loader.conversions(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Tensors of packed layers are not cast; others are, as they would be without us."""
        ours = any(getattr(op, "hf_quantizer", None) is self for op in _operations(converter))
        return None if ours else super().get_new_dtype(converter, param, dtype)

    # After.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._loader is not None
        self._loader.finish(model)
        self.report = self._loader.report(model)
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.bias is not None:
                module.bias.requires_grad_(False)
        # Names on disk are ours, whatever they were where the model came from.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(getattr(op, "hf_quantizer", None) is self for op in _operations(conversion))
        ]
        if not parallel.is_split(model):
            self.quantization_config.stored = describe(model)
        self._loader = None
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """What `save_pretrained` writes. Raises ValueError for layers that are offloaded, or split
        between ranks."""
        if parallel.is_split(model):
            raise ValueError(
                "save_pretrained: the packed layers are split between ranks; load the model "
                "without tensor parallelism to save it"
            )
        away = [
            p for p, m in model.named_modules() if isinstance(m, HoldsPacked) and m.weight.is_meta
        ]
        if away:
            raise ValueError(
                f"save_pretrained: {away[0]} and {len(away) - 1} more are offloaded by device_map; "
                "load the model without it to save it"
            )
        found = saved(model, model.dtype == torch.float32)
        state = dict(found.tensors)
        for name, tensor in model.state_dict().items():
            path, _, part = name.rpartition(".")
            module = model.get_submodule(path)
            if not isinstance(module, HoldsPacked) or part == "bias":
                state[name] = tensor
        self.quantization_config.stored = found.config
        model.config.quantization_config = self.quantization_config
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        if parallel.is_split(model):
            raise ValueError("dequantize: the packed layers are split between ranks")
        return dequantize_(model, dtype)


def _operations(conversion: Any) -> Collection[Any]:
    return getattr(conversion, "operations", None) or ()


def adopt(model: Any) -> None:
    """Gives a model that `qk.quantize_` changed a quantizer, as if `from_pretrained` had quantized
    it: without one its save_pretrained would write codes and not say what they are. Nothing happens
    to a model that has one."""
    register()
    if getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = QKernelsQuantizer(QKernelsConfig(), pre_quantized=False)


def disown(model: Any) -> None:
    """The same for `qk.dequantize_`: the model is as any other again."""
    if isinstance(getattr(model, "hf_quantizer", None), QKernelsQuantizer):
        model.hf_quantizer = None
        if isinstance(getattr(model.config, "quantization_config", None), QKernelsConfig):
            del model.config.quantization_config


def register() -> None:
    """Makes transformers know the method "qkernels", what `save_pretrained` wrote as
    compressed-tensors, and the attention of that name. Nothing happens the second time."""
    from . import attention  # noqa: F401  (registers itself)
    from .takeover import recognise_own

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QKernelsConfig)
        _register(METHOD)(QKernelsQuantizer)
        recognise_own()


__all__ = ["NOTE", "CheckpointError", "QKernelsConfig", "QKernelsQuantizer", "register"]
