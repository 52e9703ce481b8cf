"""Configurations of model families from config.json and from GGUF metadata, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from families import from_gguf, from_hf, program, weights

from qkernels.loading import rotary_row_order
from qkernels.models import FAMILIES, UnsupportedModelError, family_of_gguf, family_of_hf
from qkernels.models.llama import LLAMA
from qkernels.nn.program import (
    Attention,
    Embed,
    KvAppend,
    Linear,
    Norm,
    Select,
    reads,
    writes,
)

transformers = pytest.importorskip(
    "transformers", reason="configurations are compared with transformers'"
)

TINY = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}


def raw(kind: str, **changes: Any) -> dict[str, Any]:
    """What transformers writes to config.json: only what differs from the defaults, and the same in
    full.
    """
    return CONFIGS[kind](**{**TINY, **changes}).to_dict()


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_transformers(kind: str) -> None:
    options = {} if kind == "mistral" else {"tie_word_embeddings": kind != "gemma3_text"}
    if kind in ("llama", "qwen3", "gemma3_text"):
        options["attention_bias"] = True
    if kind == "llama":
        options["mlp_bias"] = True
    for changes in ({}, options):
        config = CONFIGS[kind](**{**TINY, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config)
        theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        ours = {d.hf: d.shape for d in weights(from_hf(config.to_dict()))}
        if from_hf(config.to_dict()).tied:
            theirs.pop("lm_head.weight")
        assert ours == theirs


@pytest.mark.parametrize("kind", CONFIGS)
def test_program_names_every_weight_once_and_reads_what_was_written(kind: str) -> None:
    config = from_hf(raw(kind))
    named = []
    written: set[str] = set()
    for step in program(config):
        assert set(reads(step)) <= written
        written |= set(writes(step))
        named += [step.weight] if isinstance(step, (Embed, Norm, Linear)) else []
        named += [step.bias] if isinstance(step, (Norm, Linear)) and step.bias else []
    if config.tied:
        named.remove("embed.weight")  # the head's use of it
    assert sorted(named) == sorted(d.name for d in weights(config))
    assert isinstance(program(config)[-2], Select)


@pytest.mark.parametrize("kind", CONFIGS)
def test_short_config_json_takes_the_defaults_of_transformers(kind: str) -> None:
    full = CONFIGS[kind](**TINY)
    short = json.loads(full.to_json_string(use_diff=True))
    assert from_hf(short) == from_hf(full.to_dict())
    for key in (
        "head_dim",
        "rms_norm_eps",
        "hidden_act",
        "num_key_value_heads",
        "tie_word_embeddings",
        "sliding_window",
        "hidden_activation",
        "layer_types",
        "query_pre_attn_scalar",
        "rope_parameters",
    ):
        short.pop(key, None)
    without = CONFIGS[kind](**{k: v for k, v in TINY.items() if k != "num_key_value_heads"})
    if without.num_attention_heads % without.num_key_value_heads == 0:
        assert from_hf(short) == from_hf(without.to_dict())


def test_windows_by_layer() -> None:
    def windows(kind: str, **changes: Any) -> list[int]:
        return [
            s.window for s in program(from_hf(raw(kind, **changes))) if isinstance(s, Attention)
        ]

    assert windows("llama") == [0, 0, 0]
    assert windows("mistral", sliding_window=16) == [16, 16, 16]
    assert windows("mistral", sliding_window=None) == [0, 0, 0]
    assert windows("qwen2", sliding_window=16) == [0, 0, 0]
    assert windows("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1) == [
        0,
        16,
        16,
    ]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows("qwen3", use_sliding_window=True, sliding_window=16, layer_types=kinds) == [
        16,
        0,
        16,
    ]
    old = {k: v for k, v in raw("qwen2").items() if k != "layer_types"}
    old |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    assert from_hf(old).windows == (0, 0, 16)


def test_layers_of_gemma3() -> None:
    def layers(**changes: Any) -> list[tuple[int, str | None]]:
        steps = program(from_hf(raw("gemma3_text", num_hidden_layers=7, **changes)))
        ropes = [s.rope for s in steps if isinstance(s, KvAppend)]
        return [
            (s.window, rope)
            for s, rope in zip((s for s in steps if isinstance(s, Attention)), ropes, strict=True)
        ]

    local, full = (512, "rope.local"), (0, "rope")
    assert layers(sliding_window=512) == [*[local] * 5, full, local]
    assert layers(sliding_window=512, sliding_window_pattern=3) == [local, local, full] * 2 + [
        local
    ]
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    assert layers(sliding_window=64, layer_types=kinds) == [full, (64, "rope.local")] * 3 + [full]
    old = {k: v for k, v in raw("gemma3_text").items() if k != "layer_types"}
    assert from_hf({**old, "sliding_window_pattern": 2}).windows == (4096, 0, 4096)
    with pytest.raises(ValueError, match="asks for sliding_attention, but sliding_window is off"):
        layers(sliding_window=None)


def test_ropes_of_gemma3() -> None:
    base = {k: v for k, v in raw("gemma3_text").items() if k != "rope_parameters"}
    usual = from_hf(base)
    assert usual.local_rope is not None
    assert (usual.rope.theta, usual.local_rope.theta, usual.rope.dim) == (1e6, 1e4, 256)
    old = from_hf(
        {
            **base,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
    )
    scaled = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}
    by_kind = {
        "full_attention": scaled,
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert old == from_hf(raw("gemma3_text", rope_parameters=by_kind))
    assert old.rope.scaling == {"rope_type": "linear", "factor": 8.0}
    assert old.local_rope is not None
    assert old.local_rope.theta == 2e4 and not old.local_rope.scaling
    assert list(old.ropes) == ["rope", "rope.local"] and list(from_hf(raw("llama")).ropes) == [
        "rope"
    ]


def test_embeddings_of_gemma3_are_scaled_in_the_type_of_the_table() -> None:
    base = {k: v for k, v in raw("gemma3_text", hidden_size=3072).items() if "dtype" not in k}
    assert from_hf(base).embed_scale == np.float32(3072**0.5)
    assert from_hf({**base, "dtype": "bfloat16"}).embed_scale == 55.5
    assert from_hf({**base, "torch_dtype": "bfloat16"}).embed_scale == 55.5
    assert from_hf({**base, "torch_dtype": "float16"}).embed_scale == np.float16(3072**0.5)
    embed = program(from_hf({**base, "dtype": "bfloat16"}))[0]
    assert isinstance(embed, Embed) and embed.multiplier == 55.5
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got 'int4'"):
        from_hf({**base, "dtype": "int4"})


def test_attention_of_gemma3_has_a_scale_of_its_own() -> None:
    def scales(**changes: Any) -> set[float]:
        steps = program(from_hf(raw("gemma3_text", **changes)))
        return {s.scale for s in steps if isinstance(s, Attention)}

    assert scales() == {1 / 16} == scales(head_dim=64)
    assert scales(query_pre_attn_scalar=64) == {1 / 8}


def test_rope_of_old_and_new_configurations() -> None:
    new = from_hf(raw("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5})).rope
    base = {k: v for k, v in raw("llama").items() if k != "rope_parameters"}
    old = from_hf({**base, "rope_theta": 5e5, "rope_scaling": LLAMA3}).rope
    legacy = from_hf({**base, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope
    assert new == old and new.theta == 5e5 and new.scaling == LLAMA3 and new.dim == 12
    assert legacy.scaling == {"rope_type": "linear", "factor": 2.0} and legacy.theta == 10000.0


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "'longrope' is not supported.*llama3",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "lacks low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
            "does not know beta",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": -1.0}},
            "factor must be a positive number",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "differ by layer",
        ),
        ("llama", {"hidden_act": "swiglu_oai"}, "hidden_act = 'swiglu_oai'"),
        ("llama", {"sliding_window": 64}, "sliding_window = 64"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("llama", {"hidden_size": None}, "lacks 'hidden_size'"),
        ("llama", {"hidden_size": "48"}, "hidden_size must be a number"),
        (
            "llama",
            {"num_hidden_layers": 0},
            "num_hidden_layers must be from 1 to 4096 layers, got 0",
        ),
        ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "gelu_fast"}, "hidden_activation = 'gelu_fast'"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "must name 3 layers, got 1"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "must be given for full_attention and sliding_attention",
        ),
        ("llama", {"rms_norm_eps": 0.0}, "norm_eps must be positive"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias = True"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked"] * 3},
            "'chunked'",
        ),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is off"),
        ("qwen3", {"layer_types": ["full_attention"]}, "must name 3 layers, got 1"),
    ],
)
def test_options_without_code_are_refused_by_name(
    kind: str, changes: dict[str, Any], words: str
) -> None:
    base = {
        k: v
        for k, v in raw(kind).items()
        if not (k == "rope_parameters" and "rope_scaling" in changes)
    }
    with pytest.raises(ValueError, match=words):
        from_hf({**base, **changes})


def test_unknown_families_are_refused_with_a_list() -> None:
    # the multimodal Gemma 3; its text model is a type of its own
    with pytest.raises(
        UnsupportedModelError, match=r"'gemma3'.*llama, mistral, qwen2, qwen3, gemma3_text"
    ):
        family_of_hf("gemma3")
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, qwen2, qwen3, gemma3"):
        family_of_gguf("mamba")
    assert family_of_hf("qwen3") is family_of_gguf("llama") is LLAMA
    assert len({name for family in FAMILIES for name in family.hf_types}) == 5


def gguf_metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 48,
        "feed_forward_length": 80,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e4,
        "rope.dimension_count": 12,
        "vocab_size": 99,
        **changes,
    }
    named = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return {
        "general.architecture": architecture,
        "general.file_type": 3,
        "tokenizer.ggml.model": "gpt2",
        **named,
    }


def gguf_shapes(*more: str) -> dict[str, tuple[int, ...]]:
    return {"token_embd.weight": (100, 48), **dict.fromkeys(more, (1,))}


def no_vector(name: str) -> list[float]:
    raise AssertionError(f"{name} was read")


def test_gguf_metadata() -> None:
    config = from_gguf(gguf_metadata(), gguf_shapes(), no_vector)
    assert (config.vocab, config.hidden, config.layers, config.ffn) == (100, 48, 2, 80)
    assert (config.q_heads, config.kv_heads, config.head_dim, config.max_position) == (
        4,
        2,
        12,
        256,
    )
    assert config.rope.theta == 5e4 and config.tied and not config.qk_norm and not config.q_bias
    untied = from_gguf(
        gguf_metadata(), gguf_shapes("output.weight", "blk.0.attn_q.bias"), no_vector
    )
    assert not untied.tied and untied.q_bias and not untied.o_bias
    qwen2 = from_gguf(gguf_metadata("qwen2"), gguf_shapes(), no_vector)
    qwen3 = from_gguf(
        gguf_metadata("qwen3", **{"attention.key_length": 16}), gguf_shapes(), no_vector
    )
    assert qwen2.q_bias and qwen2.v_bias and not qwen2.o_bias
    assert qwen3.qk_norm and qwen3.head_dim == 16
    assert not any(d.rotary_heads for d in weights(qwen2))
    assert [d.rotary_heads for d in weights(config) if d.rotary_heads] == [4, 2, 4, 2]


def test_gguf_rope() -> None:
    factors = [1.0, 1.0, 2.0, 4.0, 8.0, 8.0]
    config = from_gguf(gguf_metadata(), gguf_shapes("rope_freqs.weight"), lambda name: factors)
    assert config.rope.factors == tuple(factors)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert (
        from_gguf(gguf_metadata(**linear), gguf_shapes(), no_vector).rope.scaling["factor"] == 4.0
    )
    old = from_gguf(gguf_metadata(**{"rope.scale_linear": 4.0}), gguf_shapes(), no_vector)
    assert old.rope.scaling == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert from_gguf(gguf_metadata(**yarn), gguf_shapes(), no_vector).rope.scaling == scaling
    with pytest.raises(UnsupportedModelError, match="'yarn' together with frequency factors"):
        from_gguf(gguf_metadata(**yarn), gguf_shapes("rope_freqs.weight"), lambda name: factors)
    with pytest.raises(ValueError, match="expected 6 frequency factors, got 2"):
        from_gguf(gguf_metadata(), gguf_shapes("rope_freqs.weight"), lambda name: [1.0, 1.0])


def test_gguf_gemma3() -> None:
    def read(layers: int = 7, **changes: Any) -> Any:
        values = {
            "block_count": layers,
            "rope.dimension_count": None,
            "attention.sliding_window": 512,
            "attention.key_length": 16,
            **changes,
        }
        return from_gguf(gguf_metadata("gemma3", **values), gguf_shapes(), no_vector)

    config = read()
    assert config.windows == (512, 512, 512, 512, 512, 0, 512)
    assert config.local_rope.theta == 1e4 and config.rope.theta == 5e4 and config.rope.dim == 16
    assert config.embed_scale == np.float32(48**0.5) and config.attention_scale == 0.25
    assert config.tied and config.qk_norm and config.activation == "gelu_tanh"
    assert read(**{"rope.freq_base_swa": 2e4}).local_rope.theta == 2e4
    assert read(**{"attention.sliding_window": None}).windows == (0,) * 7
    assert read(**{"attention.sliding_window_pattern": 3}).windows == (512, 512, 0) * 2 + (512,)
    flags = np.array([True, False] * 3 + [True])
    assert read(**{"attention.sliding_window_pattern": flags}).windows == (512, 0) * 3 + (512,)
    scaled = read(**{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert scaled.rope.scaling["factor"] == 8.0 and not scaled.local_rope.scaling
    # the 27B model's scale follows from its width, which only its number of layers tells
    assert read(62).attention_scale == (48 / 4) ** -0.5
    for changes, words in (
        ({"attention.sliding_window_pattern": flags[:3]}, "must be for 7 layers, got 3"),
        ({"attention.sliding_window_pattern": np.array([1, 7])}, "a boolean per layer"),
        ({"attention.sliding_window_pattern": 0}, "must be a positive integer, got 0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attention.value_length": 32}, "value_length = 32"),
        ({"wonderful_option": 3}, "gemma3.wonderful_option = 3"),
    ):
        with pytest.raises(ValueError, match=words):
            read(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "rope type 'longrope'"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "lacks original_max_position_embeddings",
        ),
        ({"attention.value_length": 24}, "value_length = 24"),
        ({"wonderful_option": 3}, "llama.wonderful_option = 3"),
        ({"feed_forward_length": np.array([80, 96])}, "one number for all layers"),
        ({"expert_used_count": np.array([1, 2])}, "expert_used_count"),
        ({"embedding_length": None}, "lacks llama.embedding_length"),
        ({"attention.head_count": 0}, "q_heads must be a positive integer"),
        ({"rope.dimension_count": 7}, "rotary dimension must be even"),
        ({"rope.dimension_count": 64}, "rotary dimension 64 exceeds head_dim 12"),
    ],
)
def test_gguf_options_without_code_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_gguf(gguf_metadata(**changes), gguf_shapes(), no_vector)


def test_rotary_row_order_is_the_inverse_of_llama_cpp() -> None:
    heads, dim, width = 3, 8, 5
    ours = np.random.default_rng(0).normal(size=(heads * dim, width))
    # as llama.cpp's converter writes it
    file = ours.reshape(heads, 2, dim // 2, width).swapaxes(1, 2).reshape(heads * dim, width)
    assert np.array_equal(file[rotary_row_order(heads, dim, dim)], ours)
    # only the first columns of a head rotate: their neighbours in the file are pairs, the rest
    # stays
    assert rotary_row_order(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
