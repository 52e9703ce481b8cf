"""`save_pretrained`: a quantized model as a compressed-tensors directory."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints.compressed_tensors_writer import (
    Layer,
    quantization_config,
    reason_against,
    tensors,
)
from .checkpoints.shards import ShardWriter, new_directory, size_in_bytes
from .nn.decoder import QuantDecoder
from .nn.embedding import QuantEmbedding
from .nn.keep import HoldsPacked
from .nn.linear import QuantLinear

# What tokenizers and processors of transformers are stored in.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "vocab.json", "vocab.txt", "merges.txt",
    "normalizer.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

Progress = Callable[[int, int, str], Any]


@dataclass
class _Model:
    """What is written of a model. dense: names and tensors of all else; linears: paths of the dense
    linear layers; source: the directory it came from, if any."""

    layers: list[Layer]
    dense: list[tuple[str, torch.Tensor]]
    linears: list[str]
    config: dict[str, Any]
    generation: dict[str, Any]
    source: Path | None

    @property
    def dtype(self) -> str:
        """As config.json says it; transformers takes float32 where it says nothing."""
        said = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return str(_plain(said))


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    *,
    overwrite: bool = False,
    packed_embeddings: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a quantized model as compressed-tensors: config.json, safetensors, generation_config
    and tokenizer, which transformers and vLLM load without this package.

    model: a transformers model whose linear layers `quantize_` has replaced, or a QuantDecoder that
        came from a transformers model or directory.
    tokenizer: of transformers, to be saved too; None copies the tokenizer's files from the
        directory that the model came from, if there is one.
    max_shard_size: of a safetensors file, like "5GB", or in bytes.
    overwrite: replaces what is in `directory`.
    packed_embeddings: allows tables of embeddings to be packed. compressed-tensors describes them,
        and QuantDecoder reads them; transformers 5 does not load them.
    progress: called as progress(layers done, layers, name).

    Values are exactly those of the packed weights. transformers dequantizes in the type of the
    model, so a float32 model (whose scales are written in float32) computes with the same weights,
    and a bfloat16 one rounds scales and products to 8 bits. Layers of 8 bits with a scale per row
    and act="int8" become W8A8; others say nothing of activations. All or nothing: until everything
    is written, `directory` is as it was.

    Raises TypeError for another model; ValueError for layers in a format that compressed-tensors
    cannot hold (tables, two-level scales, minima, groups that do not divide a row; layers that
    replaced a Conv1D), all of them named; FileExistsError for a directory that is not empty.
    """
    limit = size_in_bytes(max_shard_size)
    found = _of_decoder(model) if isinstance(model, QuantDecoder) else _of_model(model)
    _check(found, packed_embeddings)
    with new_directory(Path(directory).expanduser(), overwrite) as partial:
        writer = ShardWriter(partial, limit)
        for done, layer in enumerate(found.layers):
            for name, tensor in tensors(layer, found.dtype == "float32").items():
                writer.add(name, tensor)
            if progress is not None:
                progress(done + 1, len(found.layers), layer.path)
        for name, tensor in found.dense:
            writer.add(name, tensor)
        writer.close()
        config = {
            **found.config,
            "quantization_config": quantization_config(found.layers, found.linears),
        }
        _write_json(partial / "config.json", config)
        if found.generation:
            _write_json(partial / "generation_config.json", found.generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        elif found.source is not None:
            for name in _TOKENIZER_FILES:
                if (found.source / name).is_file():
                    shutil.copyfile(found.source / name, partial / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """What JSON has no word for: types of torch, and enumerations."""
    return getattr(value, "value", str(value).removeprefix("torch."))


def _check(found: _Model, packed_embeddings: bool) -> None:
    """Raises ValueError where a layer cannot be written, and warns where transformers cannot read
    what the format holds."""
    if not found.layers:
        raise ValueError("save_pretrained: no layer of the model is quantized; see quantize_")
    reasons: dict[str, list[str]] = {}
    for layer in found.layers:
        reason = reason_against(layer.packed.spec, layer.packed.k)
        if reason is not None:
            reasons.setdefault(f"{layer.packed.spec}: {reason}", []).append(layer.path)
    if reasons:
        said = "; ".join(f"{_listed(paths)} ({reason})" for reason, paths in reasons.items())
        raise ValueError(f"save_pretrained: compressed-tensors cannot hold {said}")
    tables = [layer.path for layer in found.layers if layer.kind == "Embedding"]
    if tables and not packed_embeddings:
        raise ValueError(
            f"save_pretrained: {_listed(tables)} is packed, which transformers does not load: "
            "quantize without embeddings=, or write it for QuantDecoder with packed_embeddings=True"
        )
    specs = [layer.packed.spec for layer in found.layers]
    for what, which in (
        ("zero points", [spec for spec in specs if spec.zero == "integer"]),
        ("columns in act-order", [spec for spec in specs if spec.act_order]),
    ):
        if which:
            warnings.warn(
                f"save_pretrained: {len(which)} layers have {what}: QuantDecoder and vLLM read "
                "them, transformers 5 with compressed-tensors 0.20 does not",
                stacklevel=3,
            )


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + more


def _like(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """values in dtype, unless that would change them."""
    if dtype is None:
        return values
    cast = values.to(dtype)
    return cast if torch.equal(cast.to(values.dtype), values) else values


def _of_model(model: Any) -> _Model:
    if not _is_of_transformers(model):
        raise TypeError(
            "save_pretrained takes a transformers model or a QuantDecoder, got "
            f"{type(model).__name__}"
        )
    layers, linears, within = [], [], []
    first: dict[int, str] = {}  # the path of each packed weight
    ties = _ties(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HoldsPacked):
            within.append(f"{path}.")
            _check_class(path, module)
            # Once, if the class of the model ties it; else every path gets its own.
            if id(module.weight) not in first or f"{path}.weight" not in ties:
                first[id(module.weight)] = path
                layers.append(_layer(path, module))
        elif isinstance(module, nn.Linear):
            linears.append(path)
    generation = getattr(model, "generation_config", None)
    name = getattr(model, "name_or_path", "")
    return _Model(
        layers,
        list(_dense_of_model(model, tuple(within))),
        linears,
        _saved_config(model),
        json.loads(generation.to_json_string()) if generation and model.can_generate() else {},
        Path(name) if name and Path(name).is_dir() else None,
    )


def _ties(model: Any) -> set[str]:
    """Names of tensors that the class of the model ties to others when it is loaded."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _is_of_transformers(model: object) -> bool:
    config = getattr(model, "config", None)
    return isinstance(model, nn.Module) and hasattr(config, "to_json_string")


def _layer(path: str, module: HoldsPacked) -> Layer:
    kind = "Embedding" if isinstance(module, QuantEmbedding) else "Linear"
    return Layer(path, module.packed, kind, getattr(module, "act", None) == "int8")


def _check_class(path: str, module: HoldsPacked) -> None:
    """Raises ValueError for a layer that stands for another than nn.Linear or nn.Embedding."""
    replaced = module._skeleton()
    if replaced is not None and not isinstance(replaced, nn.Linear | nn.Embedding):
        raise ValueError(
            f"save_pretrained: {path} was a {type(replaced).__name__}; compressed-tensors knows "
            "Linear and Embedding only"
        )


def _saved_config(model: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": _plain(model.dtype)}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, HoldsPacked) and head.weight is not table.weight:
        config["tie_word_embeddings"] = False  # it was quantized apart from a table that is dense
    return config


def _dense_of_model(model: Any, within: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """What the state dict holds beside packed weights: a tied tensor under its first name."""
    seen: set[tuple[Any, ...]] = set()
    ties = _ties(model)
    for name, tensor in model.state_dict().items():
        path, _, part = name.rpartition(".")
        if name.startswith(within):
            layer = model.get_submodule(path)
            if part == "bias" and isinstance(layer, QuantLinear):
                yield name, _like(tensor, layer.float_dtype or model.dtype)
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name} is on meta: it has no values")
        if tensor.numel() and key in seen and name in ties:
            continue
        seen.add(key)
        yield name, tensor


def _of_decoder(decoder: QuantDecoder) -> _Model:
    config = decoder.raw_config
    if not config:
        raise ValueError(
            f"save_pretrained: {decoder.source} is no transformers model: a GGUF file is a "
            "quantized checkpoint already, in formats of its own"
        )
    said = config.get("dtype") or config.get("torch_dtype")
    dtype = said if isinstance(said, torch.dtype) else getattr(torch, str(said), None)
    layers: list[Layer] = []
    dense: list[tuple[str, torch.Tensor]] = []
    linears: list[str] = []
    for d in decoder._family.weights(decoder.config):
        path, _, part = d.name.rpartition(".")
        module, name = decoder.get_submodule(path), d.hf.removesuffix(".weight")
        if part == "weight" and isinstance(module, HoldsPacked):
            layers.append(_layer(name, module))
            continue
        values = getattr(module, part).detach()
        if d.is_matrix:
            if d.name != "embed.weight":
                linears.append(name)
        else:
            values = _like(values - d.hf_offset, dtype)
        dense.append((d.hf, values))
    if decoder.config.tied and "lm_head" not in linears:
        linears.append("lm_head")
    source = Path(decoder.source)
    return _Model(
        layers,
        dense,
        linears,
        {key: value for key, value in config.items() if key != "quantization_config"},
        decoder.generation,
        source if source.is_dir() else None,
    )
