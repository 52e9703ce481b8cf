"""Gemma 3, its text model: norms around attention and MLP on both sides, windows in most layers,
two rotations, an embedding scaled by the square root of its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..nn.program import Attention, Embed, Gate, KvAppend, Linear, Norm, Select, Step
from .config import (
    Family,
    GgufKeys,
    ModelConfig,
    RopeConfig,
    UnsupportedModelError,
    WeightDef,
    hf_activation,
    hf_flag,
    hf_layers,
    hf_mapping,
    hf_number,
    hf_windows,
    refuse_unknown_hf_options,
    rope_from_gguf,
    rope_from_hf,
    shown,
)

# Every sixth layer sees everything, where a checkpoint does not say.
_PATTERN = 6
_LOCAL_THETA, _GLOBAL_THETA = 1e4, 1e6


def program(config: ModelConfig) -> tuple[Step, ...]:
    """The steps of the whole model. What attention and MLP give is normed (`r`) before it joins the
    residual stream `h`; the sum is taken by the norm that follows, as in Llama's program.
    """
    heads = (config.q_heads, config.kv_heads, config.head_dim)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    eps = config.norm_eps
    steps: list[Step] = [Embed("h", "embed.weight", config.embed_scale)]
    for i, window in enumerate(config.windows):
        at = f"layers.{i}"

        def attended(dst: str, src: str, name: str, has_bias: bool, at: str = at) -> Linear:
            return Linear(
                dst, src, f"{at}.{name}.weight", f"{at}.{name}.bias" if has_bias else None
            )

        src, add = ("h", None) if i == 0 else ("r", "h")
        rope = "rope.local" if window and config.local_rope is not None else "rope"
        steps += [
            Norm("a", src, f"{at}.attn_norm.weight", add=add, eps=eps),
            attended("q", "a", "q", config.q_bias),
            attended("k", "a", "k", config.k_bias),
            attended("v", "a", "v", config.v_bias),
            Norm("q", "q", f"{at}.q_norm.weight", eps=eps, heads=config.q_heads),
            Norm("k", "k", f"{at}.k_norm.weight", eps=eps, heads=config.kv_heads),
            KvAppend("rotated", "q", "k", "v", i, *heads, rope=rope),
            Attention("o", "rotated", i, *heads, scale=scale, window=window),
            attended("r", "o", "o", config.o_bias),
            Norm("r", "r", f"{at}.post_attn_norm.weight", eps=eps),
            Norm("a", "r", f"{at}.ffn_norm.weight", add="h", eps=eps),
            Linear("g", "a", f"{at}.gate.weight"),
            Linear("u", "a", f"{at}.up.weight"),
            Gate("m", "g", "u", config.activation),
            Linear("r", "m", f"{at}.down.weight"),
            Norm("r", "r", f"{at}.post_ffn_norm.weight", eps=eps),
        ]
    return (
        *steps,
        Norm("f", "r", "norm.weight", add="h", eps=eps),
        Select("s", "f"),
        Linear("logits", "s", "embed.weight" if config.tied else "head.weight"),
    )


def weights(config: ModelConfig) -> tuple[WeightDef, ...]:
    """Every weight that `program` names, in the order of the program."""
    hidden, ffn, dim = config.hidden, config.ffn, config.head_dim
    q_width, kv_width = config.q_heads * dim, config.kv_heads * dim

    def norm(name: str, width: int, gguf: str, hf: str) -> WeightDef:
        # transformers computes (1 + w) * x; llama.cpp's converter writes 1 + w.
        return WeightDef(
            f"{name}.weight", (width,), f"{gguf}.weight", f"model.{hf}.weight", hf_offset=1.0
        )

    defs = [
        WeightDef(
            "embed.weight",
            (config.vocab, hidden),
            "token_embd.weight",
            "model.embed_tokens.weight",
        )
    ]
    for i in range(config.layers):
        # name in the program, in GGUF, in transformers, [N, K] or [N], has a bias
        for name, gguf, hf, shape, bias in (
            ("attn_norm", "attn_norm", "input_layernorm", (hidden,), False),
            ("q", "attn_q", "self_attn.q_proj", (q_width, hidden), config.q_bias),
            ("k", "attn_k", "self_attn.k_proj", (kv_width, hidden), config.k_bias),
            ("v", "attn_v", "self_attn.v_proj", (kv_width, hidden), config.v_bias),
            ("q_norm", "attn_q_norm", "self_attn.q_norm", (dim,), False),
            ("k_norm", "attn_k_norm", "self_attn.k_norm", (dim,), False),
            ("o", "attn_output", "self_attn.o_proj", (hidden, q_width), config.o_bias),
            (
                "post_attn_norm",
                "post_attention_norm",
                "post_attention_layernorm",
                (hidden,),
                False,
            ),
            ("ffn_norm", "ffn_norm", "pre_feedforward_layernorm", (hidden,), False),
            ("gate", "ffn_gate", "mlp.gate_proj", (ffn, hidden), False),
            ("up", "ffn_up", "mlp.up_proj", (ffn, hidden), False),
            ("down", "ffn_down", "mlp.down_proj", (hidden, ffn), False),
            ("post_ffn_norm", "post_ffw_norm", "post_feedforward_layernorm", (hidden,), False),
        ):
            here, in_gguf, in_hf = f"layers.{i}.{name}", f"blk.{i}.{gguf}", f"layers.{i}.{hf}"
            if len(shape) == 1:
                defs.append(norm(here, shape[0], in_gguf, in_hf))
                continue
            for part, part_shape in (("weight", shape), ("bias", shape[:1])):
                if part == "weight" or bias:
                    names = (f"{in_gguf}.{part}", f"model.{in_hf}.{part}")
                    defs.append(WeightDef(f"{here}.{part}", part_shape, *names))
    defs.append(norm("norm", hidden, "output_norm", "norm"))
    if not config.tied:
        shape = (config.vocab, hidden)
        defs.append(WeightDef("head.weight", shape, "output.weight", "lm_head.weight"))
    return tuple(defs)


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of config.json, or from `config.to_dict()` of transformers.

    Missing keys take the defaults of transformers. Raises UnsupportedModelError and ValueError.
    """
    off: dict[str, tuple[Any, ...]] = {
        "use_bidirectional_attention": (False,),
        "partial_rotary_factor": (1.0,),
        "mlp_bias": (False,),
    }
    refuse_unknown_hf_options(raw, off, known=("query_pre_attn_scalar",))
    layers, hidden = hf_layers(raw), hf_number(raw, "hidden_size")
    head_dim = hf_number(raw, "head_dim", int, 256)
    kinds = raw.get("layer_types")
    if kinds is None:
        every = hf_number(raw, "sliding_window_pattern", int, _PATTERN)
        local = _every(every, layers, "config.json: sliding_window_pattern")
        kinds = ["sliding_attention" if one else "full_attention" for one in local]
    off_or_default = 0 if "sliding_window" in raw else 4096  # null: off
    window = hf_number(raw, "sliding_window", int, off_or_default)
    rope, local_rope = _ropes_of_hf(raw, head_dim)
    bias = hf_flag(raw, "attention_bias")
    return ModelConfig(
        family=raw["model_type"],
        vocab=hf_number(raw, "vocab_size", int, 262_208),
        hidden=hidden,
        layers=layers,
        q_heads=hf_number(raw, "num_attention_heads"),
        kv_heads=hf_number(raw, "num_key_value_heads", int, 4),
        head_dim=head_dim,
        ffn=hf_number(raw, "intermediate_size"),
        norm_eps=hf_number(raw, "rms_norm_eps", float, 1e-6),
        rope=rope,
        local_rope=local_rope,
        max_position=hf_number(raw, "max_position_embeddings", int, 131_072),
        windows=hf_windows(kinds, layers, window),
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        o_bias=bias,
        qk_norm=True,
        activation=hf_activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        tied=hf_flag(raw, "tie_word_embeddings", True),
        embed_scale=_embed_scale(hidden, raw.get("dtype") or raw.get("torch_dtype")),
        attention_scale=_attention_scale(hf_number(raw, "query_pre_attn_scalar", float, 256.0)),
    )


def _every(count: int, layers: int, where: str) -> list[bool]:
    """Whether each layer has a window: all but every `count`-th one."""
    if count < 1:
        raise ValueError(f"{where} must be a positive integer, got {count}")
    return [(i + 1) % count != 0 for i in range(layers)]


def _attention_scale(query_pre_attn_scalar: float) -> float:
    if not query_pre_attn_scalar > 0:
        raise ValueError(
            f"config.json: query_pre_attn_scalar must be positive, got {query_pre_attn_scalar}"
        )
    return query_pre_attn_scalar**-0.5


def _embed_scale(hidden: int, dtype: Any) -> float:
    """sqrt(hidden) as transformers has it: rounded to the type of the table, so that a bfloat16
    model of width 3072 was trained with 55.5, not 55.426. dtype: of config.json; None: float32.
    """
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f"config.json: dtype must be float32, float16 or bfloat16, got {shown(dtype)}"
        )
    return float(torch.tensor(hidden**0.5, dtype=getattr(torch, name)))


def _ropes_of_hf(raw: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers that see everything and of those with a window: `rope_parameters` by
    kind of layer (transformers 5), or `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
    """
    kinds = ("full_attention", "sliding_attention")
    by_kind = hf_mapping(raw, "rope_parameters")
    if set(by_kind) - set(kinds):
        raise UnsupportedModelError(
            f"config.json of model_type {raw.get('model_type')!r}: rope_parameters must be given "
            f"for {' and '.join(kinds)}, got {shown(by_kind)}"
        )
    old = (
        {
            "rope_theta": hf_number(raw, "rope_theta", float, _GLOBAL_THETA),
            **hf_mapping(raw, "rope_scaling"),
        },
        {"rope_theta": hf_number(raw, "rope_local_base_freq", float, _LOCAL_THETA)},
    )
    full, local = (
        rope_from_hf(
            {
                "model_type": raw.get("model_type"),
                "max_position_embeddings": raw.get("max_position_embeddings"),
                "rope_parameters": {**before, **hf_mapping(by_kind, kind)},
            },
            head_dim,
        )
        for kind, before in zip(kinds, old, strict=True)
    )
    return full, local


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Iterable[float]],
) -> ModelConfig:
    """A ModelConfig from GGUF metadata. shapes: of the tensors by name, matrices as [N, K]; read:
    values of a vector.

    What older files do not say is as in llama.cpp: with a window, every sixth layer sees
    everything, and the others rotate by theta 10000, unscaled.
    """
    keys = GgufKeys(metadata)
    keys.expect("final_logit_softcapping", 0.0)
    keys.expect("attn_logit_softcapping", 0.0)
    keys.expect("attention.causal", True)
    hidden, q_heads = keys.number("embedding_length"), keys.number("attention.head_count")
    layers = keys.layers()
    head_dim = keys.number("attention.key_length", int, 256)
    keys.expect("attention.value_length", head_dim)
    table = shapes.get("token_embd.weight")
    if table is None:
        raise ValueError("GGUF file has no tensor token_embd.weight")
    keys.number("vocab_size", int, table[0])  # the table decides
    window = keys.number("attention.sliding_window", int, 0)
    where = f"GGUF metadata: {keys.architecture}.attention.sliding_window_pattern"
    pattern = keys.number_or_flags("attention.sliding_window_pattern", _PATTERN)
    local = _every(pattern, layers, where) if isinstance(pattern, int) else pattern
    if len(local) != layers:
        raise ValueError(f"{where} must be for {layers} layers, got {len(local)}")
    rope = rope_from_gguf(keys, head_dim, None)
    local_rope = RopeConfig(rope.dim, keys.number("rope.freq_base_swa", float, _LOCAL_THETA))
    # The 27B model, known by its 62 layers, divides by the square root of another width; no key
    # says so.
    width = hidden // max(q_heads, 1) if layers == 62 else head_dim
    config = ModelConfig(
        family=keys.architecture,
        vocab=table[0],
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=keys.number("attention.head_count_kv", int, q_heads),
        head_dim=head_dim,
        ffn=keys.number("feed_forward_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", float),
        rope=rope,
        local_rope=local_rope,
        max_position=keys.number("context_length"),
        windows=tuple(window if one else 0 for one in local),
        qk_norm=True,
        activation="gelu_tanh",
        tied="output.weight" not in shapes,
        embed_scale=_embed_scale(hidden, None),
        attention_scale=_attention_scale(float(width)),
    )
    keys.refuse_the_rest()
    return config


GEMMA = Family(
    name="gemma",
    hf_types=("gemma3_text",),
    gguf_types=("gemma3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    weights=weights,
    program=program,
    ignored=(r".*rotary_emb\w*\.inv_freq",),
)
