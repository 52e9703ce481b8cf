"""From a checkpoint to the named weights of a decoder, a block of rows at a time."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .checkpoints import CheckpointError, GGUFFile
from .checkpoints.formats import beside, quantized_format
from .checkpoints.quantized import Part, QuantizedFormat, check_dtypes
from .checkpoints.safetensors_directory import (
    SINGLE,
    SafetensorsDirectory,
    StateDict,
    TensorSource,
    read_json,
)
from .models import (
    Family,
    ModelConfig,
    UnsupportedModelError,
    WeightDef,
    family_of_gguf,
    family_of_hf,
)
from .ops.attention_checks import MAX_HEAD_DIM
from .quant import PackedWeight, PlainWeight, QuantSpec
from .quant.quantize import quantize

Weight = PackedWeight | torch.Tensor

# Unpacked codes of one block of rows. Blocks are decoded and packed in parts that fit the caches,
# so their size decides only what loading needs beside the packed weights, at most two blocks. Below
# this, what the allocator keeps to itself (up to 15 MB, whatever the model) would be more.
BLOCK_BYTES = 12 << 20
_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Progress(Protocol):
    """Called after every tensor with bytes or elements done, their total, and the name of the
    tensor.
    """

    def __call__(self, done: int, total: int, what: str | None = None) -> None: ...


@dataclass
class Checkpoint:
    """A loaded model without any module: what `nn.decoder` is made of.

    weights: by the names of the program; a tied table stands there once. generation: contents of
    generation_config.json, {} without one. source: the path, or what stands for it. gguf: the open
    file, if it is one.
    """

    family: Family
    config: ModelConfig
    weights: dict[str, Weight]
    source: str
    generation: dict[str, Any] = field(default_factory=dict)
    raw_config: dict[str, Any] = field(default_factory=dict)
    gguf: GGUFFile | None = None


def check_head_dim(config: ModelConfig, where: str) -> None:
    """Refuses, before minutes of loading, heads that no attention here takes."""
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"{where}: head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got "
            f"{config.head_dim}"
        )


def rows_per_block(columns: int) -> int:
    """Rows of a block: a multiple of 64, as packing needs, near BLOCK_BYTES of codes."""
    return max(64, BLOCK_BYTES // columns // 64 * 64)


def check_names(
    defs: Iterable[WeightDef],
    names: Mapping[str, tuple[int, ...]],
    of: Callable[[WeightDef], str],
    ignored: Iterable[str],
    where: str,
) -> None:
    """Holds the tensors of a checkpoint against those the model needs. Raises CheckpointError
    naming the differences.

    names: the checkpoint's tensors and shapes. of: a weight's name there. ignored: patterns of
    extras without meaning.
    """
    check_shapes({of(d): d.shape for d in defs}, names, ignored, where)


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    names: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str],
    where: str,
) -> None:
    """As `check_names`, with the names and shapes of what the model needs."""
    missing = [name for name in wanted if name not in names]
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    extra = [name for name in names if name not in wanted and not skip.fullmatch(name)]
    misshapen = [
        f"{name} (expected {list(shape)}, got {list(names[name])})"
        for name, shape in wanted.items()
        if name in names and tuple(names[name]) != tuple(shape)
    ]
    problems = []
    for what, found in (
        ("missing", missing),
        ("unexpected", extra),
        ("of the wrong shape", misshapen),
    ):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            problems.append(f"{what}: {', '.join(found[:4])}{more}")
    if problems:
        raise CheckpointError(
            f"{where}: the tensors are not those of the model; {'; '.join(problems)}"
        )


def pack_blocks(
    spec: QuantSpec, n: int, k: int, blocks: Iterable[tuple[int, PlainWeight]]
) -> PackedWeight:
    """Packs (first row, rows) one block after the other."""
    packed = PackedWeight.empty(spec, n, k)
    for start, plain in blocks:
        packed.write_rows(start, plain)
    return packed


def rotary_row_order(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """[heads * head_dim] int64: the file row of each row, where a file has rotary pairs side by
    side.

    Row i < rotary_dim / 2 of a head pairs with row i + rotary_dim / 2; the file has them at 2 i and
    2 i + 1.
    """
    pairs = np.arange(rotary_dim).reshape(rotary_dim // 2, 2).T.reshape(-1)
    head = np.concatenate([pairs, np.arange(rotary_dim, head_dim)])
    return (np.arange(heads)[:, None] * head_dim + head).reshape(-1)


def placed(weight: Weight, device: torch.device | None) -> Weight:
    """The weight on a device, None: where it is. Weights are packed on the CPU and go one by one,
    so that there is at most one of them in the CPU's memory."""
    return weight if device is None else weight.to(device)


def gguf_model(file: GGUFFile) -> tuple[Family, ModelConfig, tuple[WeightDef, ...]]:
    """What model an open GGUF file holds, from its header, and the weights that it needs, all of
    which are there in the right shapes. Raises as `load_gguf` does."""
    path, metadata = file.path, file.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: expected the name of an architecture, got {architecture!r}")
    shapes = {name: tuple(info.shape) for name, info in file.tensors.items()}
    try:
        family = family_of_gguf(architecture)
        config = family.from_gguf(metadata, shapes, lambda name: file.dense(name).float().tolist())
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from error
    check_head_dim(config, path)
    defs = family.weights(config)
    check_names(defs, shapes, lambda d: d.gguf, family.ignored, path)
    return family, config, defs


def load_gguf(
    path: str | Path, progress: Progress | None = None, device: torch.device | None = None
) -> Checkpoint:
    """Reads a GGUF file. Quantized tensors keep their values exactly, float matrices their type;
    vectors become float32.

    device: where the weights go; None is the CPU.

    Raises CheckpointError for a damaged file, UnsupportedModelError (a ValueError) for a model
    without code here.
    """
    file = GGUFFile(path)
    try:
        family, config, defs = gguf_model(file)
        total, done = sum(file.tensors[d.gguf].nbytes for d in defs), 0
        weights: dict[str, Weight] = {}
        # One buffer for the codes of all blocks, mapped so that nothing of it stays in the heap.
        room = max(rows_per_block(d.shape[-1]) * d.shape[-1] for d in defs if d.is_matrix)
        buffer = np.frombuffer(mmap.mmap(-1, room), np.uint8)
        for d in defs:
            order = (
                rotary_row_order(d.rotary_heads, config.head_dim, config.rope.dim)
                if d.rotary_heads
                else None
            )
            weights[d.name] = placed(_gguf_weight(file, d, order, buffer), device)
            done += file.tensors[d.gguf].nbytes
            if progress is not None:
                progress(done, total, d.gguf)
        return Checkpoint(family, config, weights, str(path), gguf=file)
    except BaseException:
        file.close()
        raise


def _gguf_weight(
    file: GGUFFile, d: WeightDef, order: np.ndarray | None, buffer: np.ndarray
) -> Weight:
    info = file.tensors[d.gguf]
    if info.type in ("F32", "F16", "BF16"):
        # A matrix in the order of the file stays a mapping of it; a copy would be as large as the
        # file.
        dense = file.dense(d.gguf)
        if not _finite(dense):
            raise CheckpointError(f"{file.path}: tensor {d.gguf} has values that are not finite")
        if not d.is_matrix:
            dense = dense.float().clone()
        return dense if order is None else dense[torch.from_numpy(order)]
    if not d.is_matrix:
        raise CheckpointError(
            f"{file.path}: tensor {d.gguf} must be of a float type, got {info.type}"
        )
    n, k = d.shape
    blocks = iter(file.plain_blocks(d.gguf, rows_per_block(k), order, buffer))
    start, first = next(blocks)
    packed = PackedWeight.empty(first.spec, n, k)
    packed.write_rows(start, first)
    del first
    for start, plain in blocks:
        packed.write_rows(start, plain)
    return packed


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, looking at a few megabytes at a time."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 20))


def hf_configuration(directory: Path) -> tuple[dict[str, Any], str]:
    """The contents of config.json, with the quantization that a file beside it may describe, and
    the name of the safetensors file if there is one only. Raises CheckpointError."""
    raw = read_json(directory / "config.json")
    single = None
    if raw.get("quantization_config") is None:
        config, single = beside(directory)
        if config is not None:
            raw["quantization_config"] = config
    return raw, single or SINGLE


def load_hf_directory(
    directory: Path,
    spec: QuantSpec | None,
    embeddings: QuantSpec | None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Checkpoint:
    """Reads config.json and safetensors as transformers writes them, without transformers.
    Arguments as in `load_hf`.
    """
    raw, single = hf_configuration(directory)
    generation = directory / "generation_config.json"
    with ExitStack() as stack:
        source = SafetensorsDirectory(directory, stack, single)
        loaded = load_hf(raw, source, spec, embeddings, progress, device)
    loaded.generation = read_json(generation) if generation.exists() else {}
    return loaded


def load_hf_model(
    model: Any,
    spec: QuantSpec | None,
    embeddings: QuantSpec | None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Checkpoint:
    """Takes the weights of a transformers model object. Arguments as in `load_hf`."""
    where = f"transformers model {type(model).__name__}"
    raw = model.config.to_dict()
    if isinstance(getattr(model, "dtype", None), torch.dtype):
        raw["dtype"] = str(model.dtype).removeprefix("torch.")  # the model may have been cast since
    source = StateDict(model.state_dict(), where)
    loaded = load_hf(raw, source, spec, embeddings, progress, device)
    generation = getattr(model, "generation_config", None)
    loaded.generation = generation.to_dict() if generation is not None else {}
    return loaded


def hf_model(
    raw: dict[str, Any], source: TensorSource, spec: QuantSpec | None
) -> tuple[QuantizedFormat | None, Family, ModelConfig, tuple[WeightDef, ...], set[str]]:
    """What model config.json and these tensors are: the format of its quantized weights, family,
    configuration, weights, and the names of those that are quantized. Raises as `load_hf` does."""
    stored = quantized_format(raw, source.where)
    if stored is not None and spec is not None:
        raise ValueError(
            f"{source.where}: spec is for float checkpoints; this one is quantized already "
            f"({stored.name})"
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{source.where}: config.json lacks model_type")
    try:
        family = family_of_hf(model_type)
        config = family.from_hf(raw)
    except ValueError as error:
        raise type(error)(f"{source.where}: {error}") from error
    check_head_dim(config, source.where)
    defs = family.weights(config)
    ignored = [*family.ignored]
    if config.tied:
        ignored.append(r"lm_head\.weight")
    return stored, family, config, defs, _check_tensors(defs, source, stored, ignored)


def load_hf(
    raw: dict[str, Any],
    source: TensorSource,
    spec: QuantSpec | None,
    embeddings: QuantSpec | None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Checkpoint:
    """A model from the contents of config.json and its tensors.

    spec: for every float matrix but the embedding table; embeddings: for that, and with tied
    weights for the head. None leaves them dense in the checkpoint's type. Matrices that the
    checkpoint has quantized (`quantization_config`) keep their values, and `spec` must be None.
    device: where the weights go; None is where they are (the CPU, for files).
    Quantizing and packing go by blocks of rows, so the peak of memory is the packed size plus a few
    blocks. Raises CheckpointError, UnsupportedModelError or ValueError.
    """
    stored, family, config, defs, quantized = hf_model(raw, source, spec)
    total, done = sum(int(np.prod(d.shape)) for d in defs), 0
    weights: dict[str, Weight] = {}
    for d in defs:
        wanted = embeddings if d.name == "embed.weight" else spec
        if stored is not None and d.name in quantized:
            weight: Weight = _quantized_weight(source, d, stored)
        else:
            weight = _hf_weight(source, d, wanted if d.is_matrix else None)
        weights[d.name] = placed(weight, device)
        done += int(np.prod(d.shape))
        if progress is not None:
            progress(done, total, d.hf)
    return Checkpoint(family, config, weights, source.where, raw_config=raw)


def _check_tensors(
    defs: Iterable[WeightDef],
    source: TensorSource,
    stored: QuantizedFormat | None,
    ignored: Iterable[str],
) -> set[str]:
    """Holds the tensors of a checkpoint against those the model needs, and returns the names of the
    weights that are quantized there."""
    wanted: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    quantized = set()
    for d in defs:
        found = None
        if stored is not None and d.is_matrix:
            n, k = d.shape
            found = stored.parts(source, path_of(d), n, k, kind_of(d))
        if found is None:
            wanted[d.hf] = d.shape
        else:
            quantized.add(d.name)
            parts |= found
    wanted |= {name: part.shape for name, part in parts.items()}
    given = {
        name: shape
        for name, shape in source.shapes.items()
        if name in wanted or stored is None or not stored.is_padding(source, name)
    }
    check_shapes(wanted, given, ignored, source.where)
    check_dtypes(source, parts)
    return quantized


def path_of(d: WeightDef) -> str:
    """The module that a weight belongs to."""
    return d.hf.removesuffix(".weight")


def kind_of(d: WeightDef) -> str:
    """Its kind of module, as formats call them."""
    return "Embedding" if d.name == "embed.weight" else "Linear"


def _quantized_weight(source: TensorSource, d: WeightDef, stored: QuantizedFormat) -> PackedWeight:
    n, k = d.shape
    # A quarter of a block: the words and shifts on the way to codes take a few times their size.
    matrix, step = stored.open(source, path_of(d), n, k, kind_of(d)), rows_per_block(4 * k)
    blocks = ((at, matrix.read(at, min(at + step, n))) for at in range(0, n, step))
    return pack_blocks(matrix.spec, n, k, blocks)


def _hf_weight(source: TensorSource, d: WeightDef, spec: QuantSpec | None) -> Weight:
    def checked(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in _DENSE_DTYPES:
            raise CheckpointError(
                f"{source.where}: tensor {d.hf} must be float32, float16 or bfloat16, got "
                f"{tensor.dtype}"
            )
        if not _finite(tensor):
            raise CheckpointError(f"{source.where}: tensor {d.hf} has values that are not finite")
        return tensor

    if spec is None:
        # Cloned: a dense weight must not change with the model it came from, nor keep a whole shard
        # mapped.
        dense = checked(source.whole(d.hf))
        return dense.clone() if d.is_matrix else dense.float() + d.hf_offset
    n, k = d.shape
    step = rows_per_block(4 * k)  # quantizing works on float32

    def blocks() -> Iterator[tuple[int, PlainWeight]]:
        for start in range(0, n, step):
            yield (
                start,
                quantize(checked(source.rows(d.hf, start, min(start + step, n))).float(), spec),
            )

    return pack_blocks(spec, n, k, blocks())
