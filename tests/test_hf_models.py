"""Tiny random models of every family against transformers, from objects, directories and GGUF
files.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import from_hf, weights

import qkernels as qk
from qkernels.checkpoints import CheckpointError
from qkernels.models import UnsupportedModelError
from qkernels.nn.decoder import QuantDecoder
from qkernels.nn.keep import HoldsPacked

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 3,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        **TINY, head_dim=16, rope_parameters=LLAMA3, mlp_bias=True, attention_bias=True
    ),
    "llama-tied": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral-window": transformers.MistralConfig(**TINY, head_dim=32, sliding_window=24),
    "qwen2": transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(
        **TINY, head_dim=32, tie_word_embeddings=True, rope_parameters=YARN
    ),
    # the second layer sees everything, and rotates by another table
    "gemma3": transformers.Gemma3TextConfig(
        **TINY,
        head_dim=32,
        sliding_window=24,
        sliding_window_pattern=2,
        query_pre_attn_scalar=50,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma3-untied": transformers.Gemma3TextConfig(
        **TINY, head_dim=16, sliding_window=9, attention_bias=True, tie_word_embeddings=False
    ),
}
W8 = qk.QuantSpec(8, 32, scale="float32")
TOKENS = 90


def random_model(case: str) -> Any:
    """With biases and norm weights that are not 0 and 1, as they are when fresh. Gemma's norms
    multiply by 1 + weight."""
    torch.manual_seed(len(case))
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CASES[case])).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(std=0.3)
        elif tensor.dim() == 1:
            tensor.normal_(mean=0.0 if "gemma" in model.config.model_type else 1.0, std=0.2)
        else:
            tensor.normal_(std=1.5 * tensor.shape[1] ** -0.5)
    return model


def prompt() -> torch.Tensor:
    return torch.randint(
        4, TINY["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(5)
    )


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return copy.deepcopy(model).to(dtype)(ids).logits.double()


def check_logits(decoder: QuantDecoder, model: Any) -> None:
    """Within twice the error of transformers' own float32 arithmetic, and a floor for the angles:
    transformers rounds
    frequencies to float32, which turns position p by up to p * 2^-24 more or less."""
    ids = prompt()
    exact = logits_of(model, ids, torch.float64)
    theirs = (logits_of(model, ids, torch.float32) - exact).abs().max()
    ours = (decoder(ids).logits.double() - exact).abs().max()
    assert ours <= 2 * theirs + TOKENS * 2.0**-24 * exact.abs().max(), (ours, theirs)


def dequantized(model: Any, decoder: QuantDecoder) -> Any:
    """The transformers model with the values that the packed weights stand for."""
    modules = dict(decoder.named_modules())
    state = model.state_dict()
    replaced = 0
    for d in weights(from_hf(model.config.to_dict())):
        path, _, part = d.name.rpartition(".")
        if part == "weight" and isinstance(modules[path], HoldsPacked):
            values = modules[path].packed.dequantize()
            assert not torch.equal(values, state[d.hf])
            state[d.hf].copy_(values)
            replaced += 1
    assert replaced >= 7 * TINY["num_hidden_layers"]
    return model


@pytest.mark.parametrize("case", CASES)
def test_dense_weights_give_the_logits_of_transformers(case: str) -> None:
    model = random_model(case)
    decoder = QuantDecoder.from_pretrained(model, act="float", kv_dtype="float32")
    assert "dense" in (decoder.composed_because() or "")
    check_logits(decoder, model)


@pytest.mark.parametrize("embeddings", [None, W8], ids=["dense-table", "packed-table"])
@pytest.mark.parametrize("case", CASES)
def test_w8_gives_the_logits_of_the_dequantized_model(
    case: str, embeddings: qk.QuantSpec | None
) -> None:
    model = random_model(case)
    decoder = QuantDecoder.from_pretrained(
        model, W8, embeddings=embeddings, act="float", kv_dtype="float32"
    )
    assert (decoder.composed_because() is None) == (embeddings is not None)
    check_logits(decoder, dequantized(model, decoder))


def test_info_names_both_rotations_and_the_window() -> None:
    facts = dict(qk.info(QuantDecoder.from_pretrained(random_model("gemma3"), W8)).facts)
    assert facts["rope"] == "theta 1e+06, linear; in layers with a window: theta 10000, not scaled"
    assert facts["attention"].endswith("window 24, qk-norm")
    facts = dict(qk.info(QuantDecoder.from_pretrained(random_model("llama-tied"), W8)).facts)
    assert facts["rope"] == "theta 10000, not scaled"


def test_a_scheme_says_what_activations_are() -> None:
    model = random_model("llama")
    for scheme, act in (("W4A16", "float"), ("W4A8", "int8"), (W8, "int8"), (None, "int8")):
        assert QuantDecoder.from_pretrained(model, scheme).act == act
    assert QuantDecoder.from_pretrained(model, "W4A16", act="int8").act == "int8"


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on meta"):
        QuantDecoder.from_pretrained(random_model("llama").to("meta"), W8)


@pytest.mark.parametrize("case", CASES)
def test_int8_activations_stay_near(case: str) -> None:
    model = random_model(case)
    decoder = QuantDecoder.from_pretrained(model, W8, embeddings=W8, act="int8", kv_dtype="float32")
    exact = logits_of(dequantized(model, decoder), prompt(), torch.float64)
    error = (decoder(prompt()).logits - exact).square().mean().sqrt() / exact.std()
    # Each activation is rounded to 1/127 of its group's largest, and every layer adds its share;
    # random models have no
    # redundancy to hide it. Measured: at most 4.4% of the logits' spread.
    assert 1e-5 < error < 0.07


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case: str) -> None:
    model = random_model(case)
    decoder = QuantDecoder.from_pretrained(model, act="float", kv_dtype="float32")
    prompts = [prompt()[0, :n].tolist() for n in (5, 40, 1)]
    out = decoder.generate(prompts, max_new_tokens=20, stop_at_eos=False)
    for ids, tokens in zip(prompts, out.tokens, strict=True):
        whole = torch.tensor([ids + tokens])
        with torch.no_grad():
            logits = model(whole).logits[0, len(ids) - 1 : -1]
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        assert clear.sum() > 10
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(tokens)[clear])


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("shards", ["100GB", "40KB"])
def test_a_directory_gives_what_the_object_gives(case: str, shards: str, tmp_path: Path) -> None:
    model = random_model(case)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "40KB")
    calls: list[tuple[int, int, str]] = []
    loaded = QuantDecoder.from_pretrained(
        tmp_path, W8, embeddings=W8, progress=lambda *call: calls.append(call)
    )
    made = QuantDecoder.from_pretrained(model, W8, embeddings=W8)
    assert torch.equal(loaded(prompt()).logits, made(prompt()).logits)
    assert calls[-1][0] == calls[-1][1] and [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert loaded.settings.repetition_penalty == 1.5 and loaded.settings.eos_ids == (3,)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_bfloat16_checkpoints_stay_bfloat16_where_they_are_dense(case: str, tmp_path: Path) -> None:
    model = random_model(case).bfloat16()
    model.save_pretrained(tmp_path)
    decoder = QuantDecoder.from_pretrained(tmp_path)
    assert torch.equal(
        decoder(prompt()).logits, QuantDecoder.from_pretrained(model)(prompt()).logits
    )
    assert decoder.get_submodule("layers.0.q").weight.dtype == torch.bfloat16
    assert decoder.get_submodule("layers.0.attn_norm").weight.dtype == torch.float32
    exact = logits_of(model, prompt(), torch.float64)
    theirs = (logits_of(model, prompt(), torch.bfloat16) - exact).abs().max()
    assert (decoder(prompt()).logits - exact).abs().max() <= 2 * theirs


def test_a_bfloat16_gemma_scales_its_embeddings_by_a_bfloat16() -> None:
    config = copy.deepcopy(CASES["gemma3"])
    config.hidden_size = 96  # its square root is 9.798, 9.8125 in bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    assert QuantDecoder.from_pretrained(model).config.embed_scale == 9.8125
    assert QuantDecoder.from_pretrained(model.float()).config.embed_scale == np.float32(96**0.5)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_model("qwen2").save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"

    def refused(words: str, **changes: torch.Tensor | None) -> None:
        state = {k: v for k, v in {**good, **changes}.items() if v is not None}
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            QuantDecoder.from_pretrained(tmp_path, W8)

    refused(f"missing: {q}", **{q: None})
    refused("unexpected: model.layers.9.nonsense", **{"model.layers.9.nonsense": torch.zeros(3)})
    refused(rf"{q} \(expected \[64, 64\], got \[32, 64\]\)", **{q: torch.zeros(32, 64)})
    refused(
        f"{q} must be float32, float16 or bfloat16, got torch.int32",
        **{q: torch.zeros(64, 64, dtype=torch.int32)},
    )
    refused(f"{q} has values that are not finite", **{q: torch.full((64, 64), float("nan"))})
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        QuantDecoder.from_pretrained(tmp_path, W8)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or"):
        QuantDecoder.from_pretrained(tmp_path, W8)


def test_known_extras_are_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_model("llama-tied").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(160, 64)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(state, tmp_path / "model.safetensors")
    assert QuantDecoder.from_pretrained(tmp_path, W8).config.tied


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        QuantDecoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"expected config\.json or exactly one GGUF file, found neither"
    ):
        QuantDecoder.from_pretrained(tmp_path)
    for content, error, words in (
        ("{", CheckpointError, "cannot be read as JSON"),
        ("[]", CheckpointError, "expected a JSON object"),
        ("{}", CheckpointError, "lacks model_type"),
        (
            json.dumps({"model_type": "gemma3"}),
            UnsupportedModelError,
            "'gemma3' is not supported; supported are .*gemma3_text",
        ),
    ):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        with pytest.raises(error, match=words):
            QuantDecoder.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="got a Linear without config"):
        QuantDecoder.from_pretrained(torch.nn.Linear(2, 2))


def write_gguf(
    path: Path, model: Any, architecture: str, kind: str, factors: np.ndarray | None = None
) -> None:
    """As llama.cpp's converter does it: names, interleaved rows of q and k in llama files,
    metadata.
    """
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the file")
    config = from_hf(model.config.to_dict())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.q_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    gemma = architecture == "gemma3"
    if gemma:  # converters write no more than this: the pattern and the local theta are known
        writer.add_sliding_window(config.windows[0])
        if config.rope.scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope.scaling["factor"])
    else:
        writer.add_rope_dimension_count(config.rope.dim)
    writer.add_vocab_size(config.vocab)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    state = model.state_dict()
    for d in weights(config):
        values = state[d.hf].float().numpy()
        if architecture == "llama" and ("q_proj" in d.hf or "k_proj" in d.hf):
            heads = config.q_heads if "q_proj" in d.hf else config.kv_heads
            values = (
                values.reshape(heads, 2, config.head_dim // 2, -1)
                .swapaxes(1, 2)
                .reshape(state[d.hf].shape)
            )
        if gemma and d.hf.endswith("norm.weight"):
            values = values + np.float32(1)
        values = np.ascontiguousarray(values)
        if d.is_matrix and kind != "F32":
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(d.gguf, gguf.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(d.gguf, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_TINY = {**TINY, "intermediate_size": 128}  # whole blocks of 32 columns
GGUF_CASES = {
    "llama": transformers.LlamaConfig(**GGUF_TINY, head_dim=16, rope_parameters=LLAMA3),
    "qwen2": transformers.Qwen2Config(**GGUF_TINY, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**GGUF_TINY, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(
        **{**GGUF_TINY, "num_hidden_layers": 7},
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", GGUF_CASES)
def test_gguf_files_give_the_logits_of_transformers(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the file")
    torch.manual_seed(3)
    CASES["gguf"] = GGUF_CASES[architecture]
    model = random_model("gguf")
    factors = None
    if (
        architecture == "llama"
    ):  # what llama.cpp's converter makes of the llama3 scaling: a divisor per frequency
        rope = model.model.rotary_emb.inv_freq.double().numpy()
        factors = (1e4 ** -(np.arange(0, 16, 2) / 16)) / rope
        assert factors.max() > 7.9
    path = tmp_path / "model.gguf"
    write_gguf(path, model, architecture, kind, factors)
    for (
        _name,
        tensor,
    ) in model.state_dict().items():  # transformers runs on the values that the file holds
        if tensor.dim() == 2 and kind != "F32":
            quant = gguf.GGMLQuantizationType[kind]
            values = gguf.dequantize(gguf.quantize(tensor.numpy(), quant), quant)
            tensor.copy_(torch.from_numpy(values.reshape(tensor.shape)))
    decoder = QuantDecoder.from_pretrained(path, act="float", kv_dtype="float32")
    assert (
        decoder.config.family == architecture and decoder.config.rope.dim == decoder.config.head_dim
    )
    if kind in ("F16", "BF16"):  # float matrices compute in their own type
        exact = logits_of(model, prompt(), torch.float64)
        theirs = (
            (
                logits_of(model, prompt(), {"F16": torch.float16, "BF16": torch.bfloat16}[kind])
                - exact
            )
            .abs()
            .max()
        )
        assert (decoder(prompt()).logits - exact).abs().max() <= 2 * theirs
    else:
        check_logits(decoder, model)
    assert (decoder.composed_because() is None) == (kind in ("Q8_0", "Q4_1"))


def test_gguf_files_are_held_against_the_model(tmp_path: Path) -> None:
    CASES["gguf"] = GGUF_CASES["qwen3"]
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model("gguf"), "llama", "F32")  # a qwen3 file that says llama
    with pytest.raises(CheckpointError, match=r"unexpected: blk\.0\.attn_q_norm\.weight"):
        QuantDecoder.from_pretrained(path)
    write_gguf(path, random_model("gguf"), "gemma", "F32")
    with pytest.raises(
        UnsupportedModelError, match="'gemma' is not supported; supported are llama"
    ):
        QuantDecoder.from_pretrained(path)
    write_gguf(path, random_model("gguf"), "qwen3", "Q8_0")
    with pytest.raises(ValueError, match="a GGUF file is quantized already"):
        QuantDecoder.from_pretrained(path, W8)
    assert (
        QuantDecoder.from_pretrained(tmp_path).config.family == "qwen3"
    )  # a directory with one GGUF file
