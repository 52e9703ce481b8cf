"""Tiny random models of transformers for the tests of qkernels.hf."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers

import qkernels as qk
from qkernels.convert import QuantWarning

TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**TINY),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=8),
    "gemma2": transformers.Gemma2Config(
        **TINY, **WINDOWS, attn_logit_softcapping=3.0, query_pre_attn_scalar=16
    ),
    "gemma3": transformers.Gemma3TextConfig(**TINY, **WINDOWS),
    "gpt_oss": transformers.GptOssConfig(
        **TINY, **WINDOWS, num_local_experts=2, num_experts_per_tok=1
    ),
}
# transformers' sdpa has neither softcap nor sinks.
TRUTH = {"gemma2": "eager", "gpt_oss": "eager"}


def tiny(case: str, quantized: bool = False, seed: int = 0) -> Any:
    """A causal model, float32, in evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[case])).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    if quantized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantWarning)
            qk.quantize_(model, "W8A8", progress=False)
    return model


def batch(padding: str, tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [3, tokens] and their mask; padding: "none", "left" or "right"."""
    ids = torch.randint(1, 160, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, :7] = 0
        mask[1, :2] = 0
    return ids, mask.flip(1) if padding == "right" else mask


def generate(model: Any, padding: str, new: int = 12, **options: Any) -> torch.Tensor:
    """Greedy tokens, the prompt included."""
    ids, mask = batch(padding)
    options = {"do_sample": False, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=mask, **options)  # type: ignore[no-any-return]
