"""The configuration of transformers for a model that a GGUF file describes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ..models import Family, ModelConfig, RopeConfig, UnsupportedModelError
from ..nn.parts import angles

# What converters of Llama 3.1 and 3.2 made the frequency factors of a file from: the file has the
# factors alone, transformers' configuration these numbers.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)


def host_config(family: Family, config: ModelConfig) -> Any:
    """The PreTrainedConfig of a ModelConfig, such that `family.from_hf` reads the same from it.

    Raises UnsupportedModelError, naming what differs, for a model that transformers' configuration
    cannot say.
    """
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,  # of the tokenizer, later
        "eos_token_id": None,
        "pad_token_id": None,
    }
    window = max(config.windows)
    kinds = ["sliding_attention" if w else "full_attention" for w in config.windows]
    rotation = _rotation(config.rope)
    if config.family in ("gemma3", "gemma3_text"):
        local = _rotation(config.local_rope or config.rope)
        scale = config.attention_scale or config.head_dim**-0.5
        made: Any = transformers.Gemma3TextConfig(
            **sizes,
            sliding_window=window,
            layer_types=kinds,
            query_pre_attn_scalar=round(scale**-2),  # an integer there
            hidden_activation="gelu_pytorch_tanh",
            attention_bias=config.q_bias,
            rope_parameters={"full_attention": rotation, "sliding_attention": local},
            dtype="float32",
        )
    elif config.family == "qwen2":
        sizes.pop("head_dim")
        made = transformers.Qwen2Config(
            **sizes, rope_parameters=rotation, use_sliding_window=bool(window),
            sliding_window=window or None, layer_types=kinds,
        )  # fmt: skip
    elif config.family == "qwen3":
        made = transformers.Qwen3Config(
            **sizes, rope_parameters=rotation, use_sliding_window=bool(window),
            sliding_window=window or None, layer_types=kinds, attention_bias=config.q_bias,
        )  # fmt: skip
    elif window:
        made = transformers.MistralConfig(**sizes, rope_parameters=rotation, sliding_window=window)
    else:
        made = transformers.LlamaConfig(
            **sizes,
            rope_parameters=rotation,
            attention_bias=config.o_bias,
            mlp_bias=config.mlp_bias,
        )
    _check(config, family.from_hf(made.to_dict()))
    return made


def _rotation(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of a rotation."""
    if rope.factors is None:
        return {"rope_type": "default", "rope_theta": rope.theta, **rope.scaling}
    for factor in _LLAMA3_FACTORS:
        scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
        if _same_rotation(rope, RopeConfig(rope.dim, rope.theta, scaling)):
            return {"rope_theta": rope.theta, **scaling}
    return {"rope_type": "default", "rope_theta": rope.theta}  # which `_check` refuses


def _same_rotation(one: RopeConfig | None, other: RopeConfig | None) -> bool:
    """Whether the angles are the same to the float32 in which factors are stored."""
    if one is None or other is None or one.dim != other.dim:
        return one is other
    positions = 4096
    allowed = positions * 2.0**-22
    return bool((angles(one, positions) - angles(other, positions)).abs().max() <= allowed)


def _check(wanted: ModelConfig, made: ModelConfig) -> None:
    """Raises unless both are the same model."""
    wrong = []
    for name in (f.name for f in fields(ModelConfig)):
        ours, theirs = getattr(wanted, name), getattr(made, name)
        if name == "family":
            continue
        if name in ("rope", "local_rope"):
            same = _same_rotation(ours, theirs)
        elif isinstance(ours, float) and isinstance(theirs, float):
            same = abs(ours - theirs) <= torch.finfo(torch.float32).eps * abs(ours)
        elif name == "attention_scale":
            scales = [s or wanted.head_dim**-0.5 for s in (ours, theirs)]
            same = abs(scales[0] - scales[1]) <= 1e-6 * scales[0]
        else:
            same = ours == theirs
        if not same:
            wrong.append(f"{name} (the file: {ours!r}, transformers: {theirs!r})")
    if wrong:
        raise UnsupportedModelError(
            f"{wanted.family}: transformers' configuration cannot say {'; '.join(wrong)}"
        )
