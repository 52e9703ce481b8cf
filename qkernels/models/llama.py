"""Llama and its relatives: Llama, SmolLM, Mistral, Qwen2, Qwen3. They differ by configuration
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..nn.program import Attention, Embed, Gate, KvAppend, Linear, Norm, Select, Step
from .config import (
    Family,
    GgufKeys,
    ModelConfig,
    WeightDef,
    hf_activation,
    hf_flag,
    hf_layers,
    hf_number,
    hf_windows,
    refuse_unknown_hf_options,
    rope_from_gguf,
    rope_from_hf,
)


def program(config: ModelConfig) -> tuple[Step, ...]:
    """The steps of the whole model: pre-norm blocks of attention and a gated MLP on a residual
    stream `h`.

    The sum of a block's output `r` and `h` is taken by the norm that follows, so that a row is read
    and written once.
    """
    heads = (config.q_heads, config.kv_heads, config.head_dim)
    steps: list[Step] = [Embed("h", "embed.weight")]
    for i in range(config.layers):
        at = f"layers.{i}"

        def linear(dst: str, src: str, name: str, has_bias: bool, at: str = at) -> Linear:
            return Linear(
                dst, src, f"{at}.{name}.weight", f"{at}.{name}.bias" if has_bias else None
            )

        src, add = ("h", None) if i == 0 else ("r", "h")
        steps += [
            Norm("a", src, f"{at}.attn_norm.weight", add=add, eps=config.norm_eps),
            linear("q", "a", "q", config.q_bias),
            linear("k", "a", "k", config.k_bias),
            linear("v", "a", "v", config.v_bias),
        ]
        if config.qk_norm:
            steps += [
                Norm("q", "q", f"{at}.q_norm.weight", eps=config.norm_eps, heads=config.q_heads),
                Norm("k", "k", f"{at}.k_norm.weight", eps=config.norm_eps, heads=config.kv_heads),
            ]
        steps += [
            KvAppend("rotated", "q", "k", "v", i, *heads),
            Attention(
                "o", "rotated", i, *heads, scale=config.head_dim**-0.5, window=config.windows[i]
            ),
            linear("r", "o", "o", config.o_bias),
            Norm("a", "r", f"{at}.ffn_norm.weight", add="h", eps=config.norm_eps),
            linear("g", "a", "gate", config.mlp_bias),
            linear("u", "a", "up", config.mlp_bias),
            Gate("m", "g", "u", config.activation),
            linear("r", "m", "down", config.mlp_bias),
        ]
    return (
        *steps,
        Norm("f", "r", "norm.weight", add="h", eps=config.norm_eps),
        Select("s", "f"),
        Linear("logits", "s", "embed.weight" if config.tied else "head.weight"),
    )


def weights(config: ModelConfig) -> tuple[WeightDef, ...]:
    """Every weight that `program` names, in the order of the program."""
    q_width, kv_width = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    # llama.cpp's converter puts the two halves of a rotation side by side in "llama" files, not in
    # those of Qwen.
    interleaved = config.family in ("llama", "mistral")
    q_rotary, k_rotary = (config.q_heads, config.kv_heads) if interleaved else (0, 0)
    defs = [
        WeightDef(
            "embed.weight",
            (config.vocab, config.hidden),
            "token_embd.weight",
            "model.embed_tokens.weight",
        )
    ]
    for i in range(config.layers):
        # name in the program, in GGUF, in transformers, [N, K] or [N], has a bias, heads whose rows
        # are interleaved
        for name, gguf, hf, shape, bias, rotary in (
            ("attn_norm", "attn_norm", "input_layernorm", (config.hidden,), False, 0),
            ("q", "attn_q", "self_attn.q_proj", (q_width, config.hidden), config.q_bias, q_rotary),
            ("k", "attn_k", "self_attn.k_proj", (kv_width, config.hidden), config.k_bias, k_rotary),
            ("v", "attn_v", "self_attn.v_proj", (kv_width, config.hidden), config.v_bias, 0),
            ("q_norm", "attn_q_norm", "self_attn.q_norm", (config.head_dim,), False, 0),
            ("k_norm", "attn_k_norm", "self_attn.k_norm", (config.head_dim,), False, 0),
            ("o", "attn_output", "self_attn.o_proj", (config.hidden, q_width), config.o_bias, 0),
            ("ffn_norm", "ffn_norm", "post_attention_layernorm", (config.hidden,), False, 0),
            ("gate", "ffn_gate", "mlp.gate_proj", (config.ffn, config.hidden), config.mlp_bias, 0),
            ("up", "ffn_up", "mlp.up_proj", (config.ffn, config.hidden), config.mlp_bias, 0),
            ("down", "ffn_down", "mlp.down_proj", (config.hidden, config.ffn), config.mlp_bias, 0),
        ):
            if name in ("q_norm", "k_norm") and not config.qk_norm:
                continue
            for part, part_shape in (("weight", shape), ("bias", shape[:1])):
                if part == "weight" or bias:
                    gguf_name, hf_name = f"blk.{i}.{gguf}.{part}", f"model.layers.{i}.{hf}.{part}"
                    defs.append(
                        WeightDef(
                            f"layers.{i}.{name}.{part}", part_shape, gguf_name, hf_name, rotary
                        )
                    )
    defs.append(
        WeightDef("norm.weight", (config.hidden,), "output_norm.weight", "model.norm.weight")
    )
    if not config.tied:
        defs.append(
            WeightDef(
                "head.weight", (config.vocab, config.hidden), "output.weight", "lm_head.weight"
            )
        )
    return tuple(defs)


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of config.json, or from `config.to_dict()` of transformers.

    Missing keys take the defaults of transformers. Raises UnsupportedModelError and ValueError.
    """
    family = raw["model_type"]
    qwen = family in ("qwen2", "qwen3")
    off: dict[str, tuple[Any, ...]] = {}
    if family in ("mistral", "qwen2"):
        off["attention_bias"] = (False,)
    if family != "llama":
        off["mlp_bias"] = (False,)
    if family == "llama":
        off["sliding_window"] = (0,)
        off["layer_types"] = (["full_attention"] * hf_layers(raw),)
    refuse_unknown_hf_options(raw, off)

    hidden, q_heads = hf_number(raw, "hidden_size"), hf_number(raw, "num_attention_heads")
    # Qwen3 has a head_dim of its own in transformers (128); elsewhere it follows from the width.
    head_dim = hf_number(
        raw, "head_dim", int, 128 if family == "qwen3" else hidden // max(q_heads, 1)
    )
    bias = hf_flag(raw, "attention_bias")
    qkv_bias = bias or family == "qwen2"
    # transformers' default when the key is missing; null means none
    default_kv_heads = {"mistral": 8, "qwen3": 32, "qwen2": 32}.get(family, q_heads)
    kv_heads = raw.get("num_key_value_heads", default_kv_heads)
    return ModelConfig(
        family=family,
        vocab=hf_number(raw, "vocab_size"),
        hidden=hidden,
        layers=hf_layers(raw),
        q_heads=q_heads,
        kv_heads=q_heads
        if kv_heads is None
        else hf_number({"num_key_value_heads": kv_heads}, "num_key_value_heads"),
        head_dim=head_dim,
        ffn=hf_number(raw, "intermediate_size"),
        norm_eps=hf_number(raw, "rms_norm_eps", float, 1e-6),
        rope=rope_from_hf(raw, head_dim),
        max_position=hf_number(raw, "max_position_embeddings"),
        windows=_windows_of_hf(raw, family),
        q_bias=qkv_bias,
        k_bias=qkv_bias,
        v_bias=qkv_bias,
        o_bias=bias,
        mlp_bias=hf_flag(raw, "mlp_bias") and not qwen,
        qk_norm=family == "qwen3",
        activation=hf_activation(raw, "hidden_act", "silu"),
        tied=hf_flag(raw, "tie_word_embeddings"),
    )


def _windows_of_hf(raw: Mapping[str, Any], family: str) -> tuple[int, ...]:
    """Positions seen per layer, 0 for all: every layer in Mistral, those from max_window_layers on
    in Qwen.
    """
    layers = hf_layers(raw)
    if family == "llama":
        return (0,) * layers
    # transformers' default when the key is missing; null means off
    window = hf_number(raw, "sliding_window", int, 0 if "sliding_window" in raw else 4096)
    kinds = raw.get("layer_types")
    if family == "mistral" and kinds is None:
        return (window,) * layers
    if family != "mistral" and not hf_flag(raw, "use_sliding_window"):
        window = 0
    if kinds is None:
        first = hf_number(raw, "max_window_layers", int, 28)
        return tuple(window if i >= first else 0 for i in range(layers))
    return hf_windows(kinds, layers, window)


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Iterable[float]],
) -> ModelConfig:
    """A ModelConfig from GGUF metadata. shapes: of the tensors by name, matrices as [N, K]; read:
    values of a vector.

    Biases and an untied head are there when their tensors are, as in llama.cpp.
    """
    keys = GgufKeys(metadata)
    family = keys.architecture
    for key in ("expert_count", "expert_used_count"):
        keys.expect(key, 0)
    for key in ("logit_scale", "residual_scale", "embedding_scale", "attention.scale"):
        keys.expect(key, 0.0, 1.0)
    keys.expect("use_parallel_residual", False)
    keys.expect("attention.causal", True)
    keys.expect("attention.clamp_kqv", 0.0)
    keys.text(
        "tensor_data_layout", ""
    )  # says that the rows of q and k are interleaved, as they are in every such file

    hidden, q_heads = keys.number("embedding_length"), keys.number("attention.head_count")
    layers = keys.layers()
    head_dim = keys.number("attention.key_length", int, hidden // max(q_heads, 1))
    keys.expect("attention.value_length", head_dim)
    table = shapes.get("token_embd.weight")
    if table is None:
        raise ValueError("GGUF file has no tensor token_embd.weight")
    keys.number(
        "vocab_size", int, table[0]
    )  # the table decides; some files count without the padding tokens
    factors = (
        tuple(float(x) for x in read("rope_freqs.weight"))
        if "rope_freqs.weight" in shapes
        else None
    )
    window = keys.number("attention.sliding_window", int, 0)
    q_bias, k_bias, v_bias, o_bias, mlp_bias = (
        f"blk.0.{name}.bias" in shapes
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate")
    )
    config = ModelConfig(
        family=family,
        vocab=table[0],
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=keys.number("attention.head_count_kv", int, q_heads),
        head_dim=head_dim,
        ffn=keys.number("feed_forward_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", float),
        rope=rope_from_gguf(keys, head_dim, factors),
        max_position=keys.number("context_length"),
        windows=(window,) * layers,
        q_bias=q_bias or family == "qwen2",
        k_bias=k_bias or family == "qwen2",
        v_bias=v_bias or family == "qwen2",
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        tied="output.weight" not in shapes,
    )
    keys.refuse_the_rest()
    return config


LLAMA = Family(
    name="llama",
    hf_types=("llama", "mistral", "qwen2", "qwen3"),
    gguf_types=("llama", "qwen2", "qwen3"),
    from_hf=from_hf,
    from_gguf=from_gguf,
    weights=weights,
    program=program,
    # Frequencies of the rotation follow from the configuration (or are read by from_gguf); old
    # files store them too.
    ignored=(r".*rotary_emb\.inv_freq", r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd\.weight"),
)
