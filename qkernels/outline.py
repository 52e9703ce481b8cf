"""A checkpoint without its values: every weight as the loader would make it, on the meta device.

Sizes, formats and errors come from the headers and from the code that loads; nothing is decoded or
packed. The scales and zero points of GPTQ, AWQ, compressed-tensors and bitsandbytes checkpoints are
read, since their values decide whether a matrix has zero points at all; the codes never are.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from .checkpoints import CheckpointError, GGUFFile
from .checkpoints.gguf_blocks import BY_NAME, QUANTIZED
from .checkpoints.safetensors_directory import SafetensorsDirectory, TensorSource, read_json
from .loading import (
    Checkpoint,
    Weight,
    gguf_model,
    hf_configuration,
    hf_model,
    kind_of,
    path_of,
)
from .nn.arguments import checkpoint_path, refuse_specs
from .quant import PackedWeight, QuantSpec

META = torch.device("meta")


def outline(
    path: str | Path, spec: QuantSpec | None = None, embeddings: QuantSpec | None = None
) -> Checkpoint:
    """The checkpoint at `path` with all weights on meta; arguments and errors as those of
    `QuantDecoder.from_pretrained`, but for values: scales that are not finite, say."""
    file = checkpoint_path(path)
    if file.is_dir():
        return outline_directory(file, spec, embeddings)
    refuse_specs(file, spec, embeddings)
    return outline_gguf(file)


def outline_gguf(path: str | Path) -> Checkpoint:
    """Of a GGUF file, whose header alone is read."""
    with GGUFFile(path) as file:
        family, config, defs = gguf_model(file)
        weights: dict[str, Weight] = {}
        for d in defs:
            n, k = d.shape[0], d.shape[-1]
            kind = BY_NAME[file.tensors[d.gguf].type]
            if kind.dtype is not None:
                dtype = kind.dtype if d.is_matrix else torch.float32
                weights[d.name] = torch.empty(d.shape, dtype=dtype, device=META)
            elif kind.spec is not None and d.is_matrix:
                weights[d.name] = PackedWeight.empty(kind.spec, n, k, META)
            else:
                known = ", ".join(QUANTIZED) if d.is_matrix else "F32, F16, BF16"
                raise CheckpointError(
                    f"{path}: tensor {d.gguf}: expected a type among {known}, got {kind.name}"
                )
        return Checkpoint(family, config, weights, str(path), gguf=file)  # closed: for its metadata


def outline_directory(
    directory: Path, spec: QuantSpec | None, embeddings: QuantSpec | None
) -> Checkpoint:
    """Of a directory with config.json and safetensors."""
    raw, single = hf_configuration(directory)
    with ExitStack() as stack:
        source: TensorSource = SafetensorsDirectory(directory, stack, single)
        stored, family, config, defs, quantized = hf_model(raw, source, spec)
        weights: dict[str, Weight] = {}
        for d in defs:
            n, k = d.shape[0], d.shape[-1]
            wanted = embeddings if d.name == "embed.weight" else spec
            if stored is not None and d.name in quantized:
                found = stored.open(source, path_of(d), n, k, kind_of(d)).spec
                weights[d.name] = PackedWeight.empty(found, n, k, META)
            elif d.is_matrix and wanted is not None:
                weights[d.name] = PackedWeight.empty(wanted, n, k, META)
            else:
                dtype = source.dtypes[d.hf] if d.is_matrix else torch.float32
                weights[d.name] = torch.empty(d.shape, dtype=dtype, device=META)
    generation = directory / "generation_config.json"
    return Checkpoint(
        family,
        config,
        weights,
        source.where,
        raw_config=raw,
        generation=read_json(generation) if generation.exists() else {},
    )
