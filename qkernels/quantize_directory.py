"""From a directory with a float model of transformers to one with a quantized model, a layer at a
time."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import CheckpointError
from .checkpoints.compressed_tensors_writer import reason_against
from .checkpoints.formats import beside
from .checkpoints.safetensors_directory import SafetensorsDirectory, read_json
from .checkpoints.shards import check_target, size_in_bytes
from .convert import QuantReport, quantize_
from .models import UnsupportedModelError
from .quant import QuantSpec, scheme_act
from .saving import Progress, save_pretrained

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DirectoryReport:
    """layers: what was quantized, and what was not. nbytes_before, nbytes: of the safetensors.
    seconds: quantizing, and writing."""

    layers: QuantReport
    nbytes_before: int
    nbytes: int
    seconds: tuple[float, float]


def quantize_directory(
    source: str | Path,
    out: str | Path,
    spec: str | QuantSpec = "W4A16",
    *,
    group_size: int | None = None,
    algo: str = "auto",
    embeddings: str | QuantSpec | None = None,
    skip: Collection[str] = (),
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> DirectoryReport:
    """Quantizes the linear layers of the transformers model in `source` and writes compressed-
    tensors to `out`. Needs transformers, for the classes of the model's layers.

    spec, group_size, algo, embeddings: as in `quantize_`. A scheme by name takes bfloat16 scales
    for a bfloat16 model, because transformers dequantizes in its type. skip: names of modules that
    stay dense, beside "lm_head". overwrite, max_shard_size: as in `save_pretrained`. progress:
    called as progress(weights done, weights, layer), then progress(layers written, layers, layer).

    Layers are read, quantized and freed one by one, and written one by one: memory holds the
    quantized model and one layer. Raises CheckpointError for missing, unexpected or misshapen
    tensors; ValueError, UnsupportedModelError, FileExistsError and FileNotFoundError for what
    cannot be quantized or written, as far as possible before anything is read.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    size_in_bytes(max_shard_size)
    raw = _config(source)
    check_target(out, overwrite)
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{out}: expected another directory than that of the model or above")
    dtype = _dtype(raw, source)
    chosen, act = _spec(spec, group_size, dtype)
    table = None if embeddings is None else _spec(embeddings, None, dtype)[0]
    for wanted in (chosen, table):
        reason = None if wanted is None else reason_against(replace(wanted, group_size=-1), 16)
        if reason is not None:
            raise ValueError(f"{wanted}: {reason}")
    model = _on_meta(source, raw, dtype)
    with ExitStack() as stack:
        directory = SafetensorsDirectory(source, stack)
        _check_names(model, directory.shapes, str(source))
    started = time.perf_counter()
    report = quantize_(
        model,
        chosen,
        algo=algo,
        modules_to_not_convert=("lm_head", *skip),
        embeddings=table,
        act=act,
        weights=source,
        progress=progress or False,
    )
    quantized = time.perf_counter()
    save_pretrained(
        model,
        out,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        packed_embeddings=table is not None,
        progress=progress,
    )
    seconds = (quantized - started, time.perf_counter() - quantized)
    return DirectoryReport(report, _nbytes(source), _nbytes(out), seconds)


def _nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _config(source: Path) -> dict[str, Any]:
    """The contents of config.json. Raises for what is no float model of transformers."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or directory")
    is_gguf = source.suffix == ".gguf" and source.is_file()
    if is_gguf or (source.is_dir() and not (source / "config.json").exists()):
        if is_gguf or any(source.glob("*.gguf")):
            raise UnsupportedModelError(
                f"{source}: a GGUF file is quantized already, and rounding it again would add a "
                "second error; quantize the float model that it was made from"
            )
        raise CheckpointError(f"{source}: expected config.json and safetensors, found no config")
    if not source.is_dir():
        raise CheckpointError(f"{source}: expected a directory with config.json and safetensors")
    raw = read_json(source / "config.json")
    config = raw.get("quantization_config") or beside(source)[0]
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        raise UnsupportedModelError(
            f"{source}: quantized already ({method}); expected a float model"
        )
    return raw


def _dtype(raw: Mapping[str, Any], source: Path) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"{source}: dtype {name!r} is not supported; supported are {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def _spec(
    spec: str | QuantSpec, group_size: int | None, dtype: torch.dtype
) -> tuple[QuantSpec, str]:
    """The format, and the activations that a scheme asks for."""
    if isinstance(spec, QuantSpec):
        return spec, "auto"
    # A scale per row is what compressed-tensors, and those who read it, call W8A8.
    row = group_size is None and spec.upper() == "W8A8"
    chosen = QuantSpec.from_scheme(spec, -1 if row else group_size)
    if chosen.scale == "float16" and dtype == torch.bfloat16:
        chosen = replace(chosen, scale="bfloat16")
    return chosen, scheme_act(spec)


def _on_meta(source: Path, raw: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model without values. Raises UnsupportedModelError where transformers has no class."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"quantizing a directory needs transformers: {error}") from error
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            if known is not None:
                model = known(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UnsupportedModelError(
            f"{source}: transformers cannot make the model ({name or raw.get('model_type')}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    model = model.to(dtype).eval()
    model.name_or_path = str(source)  # where its tokenizer is
    if (source / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return model


def _check_names(model: Any, shapes: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for tensors of the checkpoint that are no part of the model. (Missing
    ones are found when they are read.)"""
    known = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.(inv_freq|cos|sin)"]
    extra = [
        name
        for name in shapes
        if name not in known
        and prefix + name not in known
        and name.removeprefix(prefix) not in known
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if extra:
        more = f" and {len(extra) - 4} more" if len(extra) > 4 else ""
        raise CheckpointError(
            f"{where}: the tensors are not those of {type(model).__name__}; unexpected: "
            f"{', '.join(extra[:4])}{more}"
        )
