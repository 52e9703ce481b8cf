"""GGUF files of Llama models whose quantized blocks are random.

Speed depends on the shapes and types of the weights, not on their values. So a file with the sizes
of a large model, made here in seconds, races like the model itself, and nothing is downloaded. The
layout is that of llama.cpp's own quantizer, in which type each tensor is included; the tokenizer is
the smallest that llama.cpp accepts.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qkernels.bench.shapes import MODELS as SHAPES  # noqa: E402
from qkernels.bench.shapes import ModelShapes  # noqa: E402
from qkernels.checkpoints import CheckpointError, GGUFFile  # noqa: E402
from qkernels.checkpoints.gguf_tokenizer import byte_alphabet  # noqa: E402

TYPES = ("Q4_0", "Q4_K_M")
FORMAT = 1  # raised with every change of what `write` makes of the same arguments
IDENTITY = "qkernels.random_blocks"  # key of the metadata
_TILE_BYTES = 16 << 20  # of a tensor, made and written at a time
_ROPE_BASE, _TRAINED = 500_000.0, 8192  # tokens of context that the frequencies were trained on
_RMS_EPS = 1e-5
_CONTEXT = 131_072


@dataclass(frozen=True)
class RandomModel:
    """shapes: sizes of matrices and heads. rope_factor: how far Llama 3's scaling stretches low
    frequencies. tied: the output is the embedding table."""

    shapes: ModelShapes
    layers: int
    rope_factor: float
    tied: bool


MODELS = {
    "1b": RandomModel(SHAPES["Llama-3.2-1B"], 16, 32.0, True),
    "8b": RandomModel(SHAPES["Llama-3.1-8B"], 32, 8.0, False),
    "tiny": RandomModel(ModelShapes("Llama-tiny", 256, 512, 8, 2, 32, 512), 2, 8.0, False),
}


# Blocks. A scale follows from the spread of what it multiplies, so that weights of K columns have a
# standard deviation of 1 / sqrt(K): then a product keeps the size of its input, in any layer.


def _q4_0(raw: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """d float16, 16 bytes of codes; w = d (q - 8). Uniform codes: mean square of q - 8 is 21.5. The
    sign of d is random, as the mean of q - 8 is not 0."""
    d = std / math.sqrt(21.5) * rng.choice([-1.0, 1.0], len(raw))
    raw[:, :2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)


def _q4_k(raw: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """d, dmin float16, 12 bytes of 6-bit scales s and minima m, codes; w = d s q - dmin m.

    With dmin = 7.5 d the mean is 0, and the variance d^2 (E[s^2] (E[q^2] + 7.5^2) - 2 (7.5 *
    31.5)^2), where E[s^2] = E[m^2] = 1333.5 and E[q^2] = 77.5.
    """
    d = std / math.sqrt(1333.5 * (77.5 + 7.5**2) - 2 * (7.5 * 31.5) ** 2)
    raw[:, :4] = np.array([d, 7.5 * d], "<f2").view(np.uint8)


def _q6_k(raw: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """Codes, 16 int8 scales s, d float16 at the end; w = d s (q - 32). Mean squares: 5461.5 of s,
    341.5 of q - 32."""
    d = std / math.sqrt(5461.5 * 341.5)
    raw[:, 208:] = np.array([d], "<f2").view(np.uint8)


@dataclass(frozen=True)
class _Block:
    weights: int
    nbytes: int
    set_scales: Callable[[np.ndarray, float, np.random.Generator], None]


BLOCKS = {
    "Q4_0": _Block(32, 18, _q4_0),
    "Q4_K": _Block(256, 144, _q4_k),
    "Q6_K": _Block(256, 210, _q6_k),
}


@dataclass(frozen=True)
class TensorPlan:
    """shape: rows first. values: of a float32 vector; None for random blocks."""

    name: str
    type: str
    shape: tuple[int, ...]
    values: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        if self.values is not None:
            return self.values.nbytes
        block = BLOCKS[self.type]
        return math.prod(self.shape) // block.weights * block.nbytes

    def tiles(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The bytes of the tensor, some megabytes at a time."""
        if self.values is not None:
            yield self.values.view(np.uint8)
            return
        block = BLOCKS[self.type]
        left, step = self.nbytes // block.nbytes, _TILE_BYTES // block.nbytes
        while left:
            count = min(left, step)
            words = rng.integers(0, 2**64, -(-count * block.nbytes // 8), np.uint64)
            raw = words.view(np.uint8)[: count * block.nbytes].reshape(count, block.nbytes)
            block.set_scales(raw, self.shape[-1] ** -0.5, rng)
            yield raw
            left -= count


def more_bits(layer: int, layers: int) -> bool:
    """Whether Q4_K_M stores the value and down matrices of a layer as Q6_K: the first and last
    eighth of the layers, and every third between (llama.cpp's `use_more_bits`)."""
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


def rope_factors(dim: int, factor: float) -> np.ndarray:
    """[dim / 2] float32: what Llama 3 divides its rotary frequencies by. Wavelengths up to a fourth
    of the trained context stay, those above it are divided by `factor`, with a ramp between."""
    frequency = _ROPE_BASE ** -(np.arange(0, dim, 2) / dim)
    turns = _TRAINED * frequency / (2 * math.pi)  # in the trained context
    ramp = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / ((1.0 - ramp) / factor + ramp)).astype("<f4")


def plan(model: RandomModel, kind: str) -> list[TensorPlan]:
    """The tensors of a file. Raises ValueError for a type that is not in TYPES."""
    if kind not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {kind!r}")
    s = model.shapes
    usual = "Q4_0" if kind == "Q4_0" else "Q4_K"
    q, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
    ones = np.ones(s.hidden, "<f4")

    def vector(name: str, values: np.ndarray) -> TensorPlan:
        return TensorPlan(name, "F32", values.shape, values)

    table = "Q6_K" if model.tied else usual  # whichever matrix gives the logits is Q6_K
    tensors = [TensorPlan("token_embd.weight", table, (s.vocab, s.hidden))]
    tensors.append(vector("rope_freqs.weight", rope_factors(s.head_dim, model.rope_factor)))
    for i in range(model.layers):
        wide = "Q6_K" if kind == "Q4_K_M" and more_bits(i, model.layers) else usual
        at = f"blk.{i}."
        tensors += [
            vector(f"{at}attn_norm.weight", ones),
            TensorPlan(f"{at}attn_q.weight", usual, (q, s.hidden)),
            TensorPlan(f"{at}attn_k.weight", usual, (kv, s.hidden)),
            TensorPlan(f"{at}attn_v.weight", wide, (kv, s.hidden)),
            TensorPlan(f"{at}attn_output.weight", usual, (s.hidden, q)),
            vector(f"{at}ffn_norm.weight", ones),
            TensorPlan(f"{at}ffn_gate.weight", usual, (s.ffn, s.hidden)),
            TensorPlan(f"{at}ffn_up.weight", usual, (s.ffn, s.hidden)),
            TensorPlan(f"{at}ffn_down.weight", wide, (s.hidden, s.ffn)),
        ]
    tensors.append(vector("output_norm.weight", ones))
    if not model.tied:
        tensors.append(TensorPlan("output.weight", "Q6_K", (s.vocab, s.hidden)))
    return tensors


def identity(model: RandomModel, kind: str, seed: int = 0) -> str:
    """A digest of what a file is made from, the code by its FORMAT; the file holds it. Raises
    ValueError as `plan`."""
    digest = hashlib.sha256(repr((FORMAT, model, kind, seed)).encode())
    digest.update(repr((_ROPE_BASE, _TRAINED, _RMS_EPS, _CONTEXT)).encode())
    for tensor in plan(model, kind):
        digest.update(repr((tensor.name, tensor.type, tensor.shape)).encode())
        if tensor.values is not None:
            digest.update(tensor.values.tobytes())
    return digest.hexdigest()


def is_current(path: Path, model: RandomModel, kind: str, seed: int = 0) -> bool:
    """Whether the file is whole and what `write` would make now."""
    try:
        with GGUFFile(path) as file:
            return file.metadata.get(IDENTITY) == identity(model, kind, seed)
    except CheckpointError:
        return False


def _add_tokenizer(writer: Any, vocab: int) -> None:
    """A byte-level vocabulary of 256 bytes, one merge, two control tokens and unused ones."""
    known = [*byte_alphabet(), "he", "<|begin_of_text|>", "<|end_of_text|>"]
    if vocab < len(known):
        raise ValueError(f"a vocabulary of at least {len(known)} tokens is needed, got {vocab}")
    spare = vocab - len(known)
    normal, control, unused = 1, 3, 5
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*known, *(f"<unused{i}>" for i in range(spare))])
    writer.add_token_types([normal] * (len(known) - 2) + [control] * 2 + [unused] * spare)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(known.index("<|begin_of_text|>"))
    writer.add_eos_token_id(known.index("<|end_of_text|>"))


def _add_metadata(writer: Any, model: RandomModel, kind: str, seed: int) -> None:
    import gguf

    s = model.shapes
    writer.add_name(f"{s.name}, random blocks")
    writer.add_string(IDENTITY, identity(model, kind, seed))
    writer.add_block_count(model.layers)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(s.ffn)
    writer.add_head_count(s.q_heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_layer_norm_rms_eps(_RMS_EPS)
    writer.add_rope_freq_base(_ROPE_BASE)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_vocab_size(s.vocab)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
    _add_tokenizer(writer, s.vocab)


def write(path: Path, model: RandomModel, kind: str, seed: int = 0) -> Path:
    """Writes the file, a tile at a time, under another name until it is whole; returns `path`.

    Raises ValueError for an unknown type, ImportError where the package gguf is missing.
    """
    import gguf

    tensors = plan(model, kind)
    rng = np.random.Generator(np.random.SFC64(seed))
    unfinished = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    try:
        _add_metadata(writer, model, kind, seed)
        for tensor in tensors:
            # For quantized tensors the writer takes the shape in bytes and derives that of weights.
            code, shape = gguf.GGMLQuantizationType[tensor.type], list(tensor.shape)
            if tensor.values is None:
                block = BLOCKS[tensor.type]
                shape[-1] = shape[-1] // block.weights * block.nbytes
            dtype = np.dtype(np.float32 if tensor.values is not None else np.uint8)
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(out, out.tell())
            for tile in tensor.tiles(rng):
                tile.tofile(out)
        writer.write_padding(out, out.tell())
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return path


def with_layers(model: RandomModel, layers: int | None) -> RandomModel:
    """The same shapes in fewer, or more, layers."""
    if layers is None:
        return model
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    return replace(model, layers=layers)
