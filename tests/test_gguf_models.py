"""GGUF files that mix block types, as those of llama.cpp's quantizer do, of every family, against
transformers on the values that the `gguf` package decodes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import from_hf, weights
from gguf_writer import TYPES, Tensor, bpe_tokenizer, random_blocks, write_gguf

from qkernels.nn import QuantDecoder, QuantEmbedding

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")
gguf = pytest.importorskip("gguf", reason="the gguf package decodes the blocks")

TINY = {
    "vocab_size": 320,
    "hidden_size": 256,  # one block of 256 columns
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Any] = {
    "mistral": transformers.MistralConfig(**TINY, head_dim=64, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=64, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(
        **{**TINY, "num_hidden_layers": 6}, head_dim=64, sliding_window=16, query_pre_attn_scalar=64
    ),
}
ARCHITECTURE = {"mistral": "llama"}  # elsewhere the name of the case
DENSE = ("F32", "F16", "BF16")
BLOCKS = [kind for kind in TYPES if kind not in (*DENSE, "NVFP4")]  # NVFP4 is refused
TOKENS = 40


def write(path: Path, case: str, table: str, seed: int) -> Any:
    """Writes a file whose matrices go through all types in turn, `table` the embedding's, and
    returns the transformers model of the same values.
    """
    rng = np.random.default_rng(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[case])).eval()
    config, architecture = from_hf(model.config.to_dict()), ARCHITECTURE.get(case, case)
    state, tensors, turn = model.state_dict(), [], seed
    for d in weights(config):
        if not d.is_matrix:
            values = (1 + 0.2 * rng.standard_normal(d.shape)).astype("<f4")
            tensors.append(Tensor(d.gguf, "F32", d.shape, values.tobytes()))
            state[d.hf].copy_(torch.from_numpy(values - np.float32(d.hf_offset)))
            continue
        turn += 1
        kind = table if d.name == "embed.weight" else BLOCKS[turn % len(BLOCKS)]
        count = d.shape[0] * d.shape[1] // TYPES[kind][1]
        raw = random_blocks(kind, count, rng)
        tensors.append(Tensor(d.gguf, kind, d.shape, raw.tobytes()))
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(d.shape)
        if d.rotary_heads:  # pairs of a rotation side by side -> one half after the other
            pairs = values.reshape(d.rotary_heads, config.head_dim // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(d.shape)
        state[d.hf].copy_(torch.from_numpy(np.ascontiguousarray(values)))
    sizes = {
        "block_count": config.layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.q_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,
    }
    if architecture == "gemma3":
        sizes["attention.sliding_window"] = config.windows[0]
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        **bpe_tokenizer(config.vocab),
    }
    write_gguf(path, metadata, tensors)
    return model


@torch.no_grad()
def check(path: Path, model: Any) -> QuantDecoder:
    """Logits within twice the error of transformers' own float32 arithmetic, and a floor for the
    angles, as in test_hf_models."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(TINY["vocab_size"], (2, TOKENS), generator=generator)
    decoder = QuantDecoder.from_pretrained(path, act="float", kv_dtype="float32")
    exact = copy.deepcopy(model).double()(ids).logits
    theirs = (model(ids).logits - exact).abs().max()
    ours = (decoder(ids).logits - exact).abs().max()
    assert ours <= 2 * theirs + TOKENS * 2.0**-24 * exact.abs().max(), (ours, theirs)
    return decoder


@pytest.mark.filterwarnings("ignore::qkernels.backends.FallbackWarning")
@pytest.mark.parametrize("case", CONFIGS)
def test_files_of_mixed_block_types(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write(path, case, "Q6_K", seed=3)
    decoder = check(path, model)
    assert len({str(use.weight.spec) for use in decoder.uses()}) > 8
    assert decoder.nbytes <= 1.05 * path.stat().st_size
    assert decoder.text.bos_id is not None


@pytest.mark.filterwarnings("ignore::qkernels.backends.FallbackWarning")
@pytest.mark.parametrize("kind", BLOCKS)
def test_tables_of_every_block_type(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write(path, "qwen3", kind, seed=4)
    decoder = check(path, model)
    embed = decoder.get_submodule("embed")
    assert isinstance(embed, QuantEmbedding)
    table = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(embed(torch.arange(len(table))), table)
