"""The model that is served: of transformers, on packed weights, its decoder layers run by ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loading import Progress
from ..nn.arguments import DEFAULT_CONTEXT, checkpoint_path
from ..quant import QuantSpec, scheme_act
from .packed_model import packed_model


@dataclass(frozen=True)
class ServedModel:
    """model, tokenizer: of transformers. limit: tokens of a prompt and its answer. runs: how it
    does, in words."""

    model: Any
    tokenizer: Any
    limit: int
    runs: str


def served_model(
    path: str | Path,
    *,
    spec: str | None = None,
    group_size: int | None = None,
    act: str = "auto",
    kv_dtype: str = "auto",
    context: int | None = None,
    attention: str | None = None,
    replace_layers: bool = True,
    progress: Progress | None = None,
) -> ServedModel:
    """Loads a checkpoint for the server.

    path, spec, group_size, act: as for `QuantDecoder.from_pretrained`. context: tokens of a prompt
    and its answer, None: what the model was made for, at most 32768. attention: transformers' name
    of an attention implementation; its own layers run then. replace_layers: whether the decoder
    layers are run by our programs. kv_dtype: of their cache.

    Raises as `packed_model` does, ValueError for a context that is out of range, a tokenizer
    without a chat template counts as one: completions work.
    """
    found = checkpoint_path(path)
    quant = None if spec is None else QuantSpec.from_scheme(spec, group_size)
    if act == "auto" and spec is not None:
        act = scheme_act(spec)
    model, tokenizer = packed_model(found, quant, act=act, progress=progress)
    longest = model.config.max_position_embeddings
    limit = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not 1 < limit <= longest:
        raise ValueError(f"context: expected 2 to {longest} tokens, got {limit}")
    if attention is not None:
        _use_attention(model, attention)
        return ServedModel(model, tokenizer, limit, f"layers of transformers, {attention}")
    if replace_layers:
        from .layers import replace_decoder_layers_

        replace_decoder_layers_(model, act=act, kv_dtype=kv_dtype, max_seq_len=limit)
        return ServedModel(model, tokenizer, limit, "decoder layers of qkernels")
    return ServedModel(model, tokenizer, limit, "layers of transformers on packed weights")


def _use_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attention {name!r}: {error}") from error
