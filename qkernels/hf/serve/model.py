"""The model that is served: of transformers, on packed weights, its decoder layers run by ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.safetensors_directory import read_json
from ...loading import Progress
from ...models import UnsupportedModelError, family_of_hf
from ...nn.arguments import DEFAULT_CONTEXT, checkpoint_path
from ...nn.keep import HoldsPacked
from ...quant import QuantSpec, scheme_act
from ..packed_model import packed_model


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
    known = is_known(found)
    if known:
        model, tokenizer = packed_model(found, quant, act=act, progress=progress)
    else:
        model, tokenizer = other_model(found, quant, act)
    longest = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    limit = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not 1 < limit <= longest:
        raise ValueError(f"context: expected 2 to {longest} tokens, got {limit}")
    if attention is not None:
        _use_attention(model, attention)
        return ServedModel(model, tokenizer, limit, f"layers of transformers, {attention}")
    if replace_layers and known:
        from ..layers import replace_decoder_layers_

        replace_decoder_layers_(model, act=act, kv_dtype=kv_dtype, max_seq_len=limit)
        return ServedModel(model, tokenizer, limit, "decoder layers of qkernels")
    return ServedModel(model, tokenizer, limit, "layers of transformers on packed weights")


def is_known(path: Path) -> bool:
    """Whether the model is of a family that `QuantDecoder` runs, by its name alone. A GGUF file is
    taken for one: others are refused when it is read."""
    if not path.is_dir():
        return True
    try:
        family_of_hf(str(read_json(path / "config.json").get("model_type")))
    except UnsupportedModelError:
        return False
    return True


def other_model(path: Path, spec: QuantSpec | None, act: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory with any causal language model of transformers, loaded by
    it: its linear layers on packed weights, those of the checkpoint (GPTQ, AWQ, compressed-tensors)
    or with a spec quantized. Raises ValueError for a float model without a spec, of which nothing
    would be ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..quantizer import QKernelsConfig
    from ..takeover import taken_over

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if spec is not None:
        options["quantization_config"] = QKernelsConfig(spec, act=act)
    with taken_over("gptq", "awq", "compressed-tensors", act=act):
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    if not any(isinstance(module, HoldsPacked) for module in model.modules()):
        raise ValueError(
            f"{path}: a float {model.config.model_type} model, none of whose layers would run on "
            "packed weights: give --spec, such as W4A8"
        )
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _use_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attention {name!r}: {error}") from error
