"""GGUF files in stock `from_pretrained(directory, gguf_file=...)`, their blocks kept as they are.

transformers makes the model and its tokenizer from the file; here are its weights, by the readers
of `QuantDecoder` and under transformers' names: packed where the file has blocks, else dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..convert.plan import Choice, Target, kind_of
from ..loading import load_gguf
from ..models import UnsupportedModelError
from ..quant import PackedWeight
from .loading import Gathers, Slot
from .quantizer import QKernelsConfig, QKernelsQuantizer

_ON_DISK = {"codes": "weight"}


class Blocks(Gathers):
    """The packed weights of a file, all of them in memory. state: all tensors of the model by
    transformers' names."""

    def __init__(self, model: Any, path: str, act: str) -> None:
        super().__init__(model)
        loaded = load_gguf(path)
        self.state: dict[str, Tensor] = {}
        self._paths: list[str] = []
        self._parts: list[str] = []
        slots = []
        for d in loaded.family.weights(loaded.config):
            name, weight = self._name(model, d.hf), loaded.weights.pop(d.name)
            if name is None:
                continue  # a head, where the model is only the base of one
            if not isinstance(weight, PackedWeight):
                # A copy: matrices are still mapped from the file.
                self.state[name] = weight.clone() if d.is_matrix else weight - d.hf_offset
                continue
            place = name.removesuffix(".weight")
            targets = []
            for holder in (place, *_tied_to(model, name)):
                module = model.get_submodule(holder)
                kind = kind_of(module)
                if kind is None:
                    raise UnsupportedModelError(
                        f"{path}: {holder} is a {type(module).__name__}, which cannot hold the "
                        f"blocks of {d.gguf}"
                    )
                targets.append(Target(module, (holder,), kind, Choice(weight.spec, act)))
            if (weight.n, weight.k) != targets[0].shape:
                raise UnsupportedModelError(
                    f"{path}: {d.gguf} is {[weight.n, weight.k]}, transformers makes {place} of "
                    f"{list(targets[0].shape)}"
                )
            slots.append(Slot.of(targets))
            self._paths.append(place)
            named = {_ON_DISK.get(part, part): t for part, t in weight.tensors().items()}
            self._parts += [part for part in named if part not in self._parts]
            self.state |= {f"{place}.{part}": t for part, t in named.items()}
        self._put(model, slots)

    def _name(self, model: Any, name: str) -> str | None:
        known = {path for path, _ in model.named_modules(remove_duplicate=False)}
        for candidate in (name, name.removeprefix(f"{self._base}.")):
            if candidate.rpartition(".")[0] in known:
                return candidate
        return None

    def _gathered(self) -> tuple[Sequence[str], Sequence[str]]:
        return self._paths, self._parts

    def packed(self, slot: Slot, path: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        named = {"codes" if name == "weight" else name: t for name, t in tensors.items()}
        return PackedWeight.from_tensors(slot.spec, slot.n, slot.k, named)


def _tied_to(model: Any, name: str) -> list[str]:
    """Paths of the modules that are tied to a parameter."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return [tied.removesuffix(".weight") for tied, source in ties.items() if source == name]


class GgufQuantizer(QKernelsQuantizer):
    """transformers' hooks for a GGUF file."""

    act = "float"

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # transformers looks at its method until the file is found, and takes no other than its own.
        stored = QKernelsConfig.of_stored({})
        super().__init__(stored, **{**kwargs, "pre_quantized": True})
        self.quantization_config = quantization_config
        self._file = ""

    def read_header(self, gguf_file: str) -> None:
        self._file = str(gguf_file)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if dtype is None else dtype

    def update_device_map(self, device_map: Any) -> Any:
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        if "disk" in {str(place) for place in places}:
            raise ValueError(
                "qkernels: a GGUF file cannot be offloaded to disk: load it, save_pretrained it, "
                "and load that"
            )
        return device_map

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        with torch.device("cpu"):
            self._loader = Blocks(model, self._file, self.act)
        return self._prepared(model, device_map)

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Tensor]:
        assert isinstance(self._loader, Blocks)
        state, self._loader.state = self._loader.state, {}
        return state

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Ours alone: those of the model are for its safetensors."""
        return self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config = QKernelsConfig.of_stored({})
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.config.quantization_config = self.quantization_config
        model.quantization_method = self.quantization_config.quant_method
        return model


def quantizer_class(act: str) -> Callable[..., Any]:
    """What stands for GGUF in transformers' table of quantizers. Its `dequantize=True` goes where
    it went before."""
    stock: Any = AUTO_QUANTIZER_MAPPING["gguf"]
    chosen = "float" if act == "auto" else act

    class Chosen(GgufQuantizer):
        act = chosen

    def make(quantization_config: Any, **kwargs: Any) -> Any:
        dense = getattr(quantization_config, "dequantize", False)
        return (stock if dense else Chosen)(quantization_config, **kwargs)

    return make
