"""Writes GGUF files for tests: any header, well-formed or not, and llama models of any size with
random blocks."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# ggml type -> (number, elements per block, bytes per block, byte offsets of its float16 numbers)
TYPES = {
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, ()),
    "BF16": (30, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q2_K": (10, 256, 84, (80, 82)),
    "Q3_K": (11, 256, 110, (108,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "IQ4_NL": (20, 32, 18, (0,)),
    "IQ4_XS": (23, 256, 136, (0,)),
    "MXFP4": (39, 32, 17, ()),
    "NVFP4": (40, 64, 36, ()),  # refused
}
SCALAR_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
CHUNK = 1 << 22


@dataclass(frozen=True)
class Typed:
    """A metadata value with its GGUF type spelled out; `element` is the type of an array's
    elements."""

    kind: int
    value: Any
    element: int | None = None


@dataclass
class Tensor:
    """shape: rows first. data: the bytes of the tensor, or None for random blocks with finite
    scales."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: bytes | None = None
    number: int | None = None  # a type number other than that of `type`
    offset: int | None = None  # an offset other than the right one

    @property
    def nbytes(self) -> int:
        _, elements, size, _ = TYPES[self.type]
        return int(np.prod(self.shape, dtype=object)) // elements * size


def string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> Typed:
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return Typed(7, value)
    if isinstance(value, int):
        return Typed(4, value)
    if isinstance(value, float):
        return Typed(6, value)
    if isinstance(value, (str, bytes)):
        return Typed(STRING, value)
    first = typed(value[0]).kind if len(value) else 4
    return Typed(ARRAY, value, 5 if first == 4 else first)


def payload(item: Typed) -> bytes:
    if item.kind == STRING:
        return string(item.value)
    if item.kind == ARRAY:
        head = struct.pack("<IQ", item.element, len(item.value))
        if item.element == STRING:
            return head + b"".join(map(string, item.value))
        if item.element == ARRAY:
            return head + b"".join(payload(typed(v)) for v in item.value)
        return head + struct.pack(f"<{len(item.value)}{SCALAR_CODES[item.element]}", *item.value)
    return struct.pack("<" + SCALAR_CODES[item.kind], item.value)


def random_blocks(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, bytes per block] uint8: random codes, float16 numbers of the size that weights
    have."""
    _, _, size, halves = TYPES[kind]
    if kind in ("F32", "F16", "BF16"):
        values = (rng.standard_normal(count) * 0.02).astype("<f4")
        if kind == "F16":
            values = values.astype("<f2")
        raw = values.view(np.uint8).reshape(count, -1)
        return raw[:, 2:].copy() if kind == "BF16" else raw
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(115, 125, count)
    for offset in halves:
        size = 0.01 if TYPES[kind][1] == 32 else 0.0005  # times a sub-scale of up to 127
        scales = (rng.standard_normal(count) * size).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


def _stream(tensor: Tensor, rng: np.random.Generator, chunks: dict[str, bytes]) -> Iterator[bytes]:
    """The tensor's bytes; large ones repeat one random chunk, so that gigabytes take seconds."""
    if tensor.data is not None:
        yield tensor.data
        return
    size = TYPES[tensor.type][2]
    if tensor.nbytes <= CHUNK // 16:
        yield random_blocks(tensor.type, tensor.nbytes // size, rng).tobytes()
        return
    if tensor.type not in chunks:
        chunks[tensor.type] = random_blocks(tensor.type, CHUNK // size, rng).tobytes()
    chunk, left = chunks[tensor.type], tensor.nbytes
    while left:
        part = chunk[: min(left, len(chunk))]
        yield part
        left -= len(part)


def header_bytes(
    metadata: Mapping[str, Any], tensors: Sequence[Tensor], *, version: int = 3, alignment: int = 32
) -> tuple[bytes, list[int]]:
    """The header up to its last byte, and each tensor's offset within the data."""
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        item = typed(value)
        out.append(string(key) + struct.pack("<I", item.kind) + payload(item))
    offsets, position = [], 0
    for tensor in tensors:
        offsets.append(position)
        dims = tuple(reversed(tensor.shape))
        number = TYPES[tensor.type][0] if tensor.number is None else tensor.number
        offset = position if tensor.offset is None else tensor.offset
        out.append(
            string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)
        )
        position += -(-tensor.nbytes // alignment) * alignment
    return b"".join(out), offsets


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    version: int = 3,
    alignment: int = 32,
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """Writes the file and returns its path.

    alignment: other than 32, it must be in the metadata too. sparse: large tensors get their first
    4 MiB only; the rest is a hole of the file, zeros that take neither time nor disk, so that a
    file of any size can be had at once.
    """
    header, _ = header_bytes(metadata, tensors, version=version, alignment=alignment)
    rng, chunks = np.random.default_rng(seed), {}
    with open(path, "wb") as file:
        file.write(header)
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            start = file.tell()
            for part in _stream(tensor, rng, chunks):
                file.write(part)
                if sparse and tensor.data is None:
                    file.seek(start + tensor.nbytes)
                    break
        end = file.tell()
        file.truncate(end + -end % alignment)
    return Path(path)


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE vocabularies, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def bpe_tokenizer(vocab: int = 320) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: 256 bytes, 8 merges, two special tokens, unused fillers
    up to `vocab`."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d"]
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), "<|bos|>", "<|eos|>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]
    if vocab < len(tokens):
        raise ValueError(f"a vocabulary of at least {len(tokens)} tokens is needed, got {vocab}")
    kinds += [5] * (vocab - len(tokens))
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|bos|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|eos|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}"
        "<|bos|>{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}",
    }


def spm_tokenizer(*, with_bytes: bool = True, **changes: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer: parts of a sentence as pieces with distinct scores,
    bytes, special tokens;
    changes: keys of tokenizer.ggml."""
    tokens = ["<unk>", "<s>", "</s>"]
    kinds, scores = [2, 3, 3], [0.0, 0.0, 0.0]
    if with_bytes:
        tokens += [f"<0x{i:02X}>" for i in range(256)]
        kinds += [6] * 256
        scores += [0.0] * 256
    text = "▁the▁theory▁of▁other▁things▁then▁hello▁world▁▁▁▁there"
    rng = random.Random(3)
    pieces = list(dict.fromkeys(text[i : i + n] for n in range(2, 7) for i in range(len(text) - n)))
    rng.shuffle(pieces)
    pieces = pieces[:120] + list(dict.fromkeys(text + "ab."))
    tokens += pieces
    kinds += [1] * len(pieces)
    scores += [-float(i) for i in range(len(pieces))]
    tokens += ["<mark>", "  "]
    kinds += [4, 4]
    scores += [-1000.0, -1000.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def write_llama(
    path: str | os.PathLike[str],
    *,
    hidden: int = 64,
    ffn: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    kind: str = "Q4_0",
    embedding: str = "Q8_0",
    output: str | None = None,
    context: int = 2048,
    rope_base: float = 10_000.0,
    eps: float = 1e-5,
    tokenizer: Mapping[str, Any] | None = None,
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """A llama model with random weights; its norms are ones. output: None ties the output to the
    embedding.

    Llama 3 8B: hidden 4096, ffn 14336, layers 32, heads 32, kv_heads 8, vocab 128256, output
    "Q8_0", rope_base 5e5.
    """
    head_dim = head_dim or hidden // heads
    ones = np.ones(hidden, "<f4").tobytes()
    metadata = {
        "general.architecture": "llama",
        "general.name": "random",
        "llama.block_count": layers,
        "llama.context_length": context,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(eps),
        "llama.rope.freq_base": float(rope_base),
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": vocab,
        **(bpe_tokenizer(vocab) if tokenizer is None else tokenizer),
    }
    tensors = [Tensor("token_embd.weight", embedding, (vocab, hidden))]
    for i in range(layers):
        tensors += [
            Tensor(f"blk.{i}.attn_norm.weight", "F32", (hidden,), ones),
            Tensor(f"blk.{i}.attn_q.weight", kind, (heads * head_dim, hidden)),
            Tensor(f"blk.{i}.attn_k.weight", kind, (kv_heads * head_dim, hidden)),
            Tensor(f"blk.{i}.attn_v.weight", kind, (kv_heads * head_dim, hidden)),
            Tensor(f"blk.{i}.attn_output.weight", kind, (hidden, heads * head_dim)),
            Tensor(f"blk.{i}.ffn_norm.weight", "F32", (hidden,), ones),
            Tensor(f"blk.{i}.ffn_gate.weight", kind, (ffn, hidden)),
            Tensor(f"blk.{i}.ffn_up.weight", kind, (ffn, hidden)),
            Tensor(f"blk.{i}.ffn_down.weight", kind, (hidden, ffn)),
        ]
    tensors.append(Tensor("output_norm.weight", "F32", (hidden,), ones))
    if output is not None:
        tensors.append(Tensor("output.weight", output, (vocab, hidden)))
    return write_gguf(path, metadata, tensors, seed=seed, sparse=sparse)
