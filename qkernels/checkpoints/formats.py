"""Which format of quantized weights a transformers checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .awq import AWQ
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .errors import CheckpointError
from .gptq import GPTQ
from .quantized import QuantizedFormat
from .safetensors_directory import read_json

FORMATS: dict[str, type[QuantizedFormat]] = {
    kind.name: kind for kind in (GPTQ, AWQ, CompressedTensors, BitsAndBytes)
}
# Files of their own in which AutoGPTQ and AutoAWQ said it before transformers' config.json did.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def quantized_format(raw: Mapping[str, Any], where: str) -> QuantizedFormat | None:
    """The format that `quantization_config` in the contents of config.json describes; None without
    one.

    Raises CheckpointError for a method that no reader knows, and for settings that the reader does
    not support. where: the beginning of messages.
    """
    config = raw.get("quantization_config")
    if config is None:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} must be a mapping, got {config!r}")
    method = config.get("quant_method")
    if method is None and ("load_in_8bit" in config or "load_in_4bit" in config):
        method = BitsAndBytes.name  # which old files do not say
    method = getattr(method, "value", method)  # of an enumeration, in a configuration object
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"{where}: quant_method {method!r} is not supported; supported are "
            f"{', '.join(FORMATS)} (and GGUF files)"
        )
    return FORMATS[method](config, where)


def beside(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The quantization_config that a file of its own holds, and the name of the safetensors file
    that it names; (None, None) without such a file."""
    for name, method in _BESIDE.items():
        path = directory / name
        if path.exists():
            config = read_json(path)
            file = config.get("model_file_base_name")
            if file is not None and (not isinstance(file, str) or "/" in file or "\\" in file):
                raise CheckpointError(
                    f"{path}: model_file_base_name must be the name of a file, got {file!r}"
                )
            return {"quant_method": method, **config}, file and f"{file}.safetensors"
    return None, None
