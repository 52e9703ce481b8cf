"""A decoder with random weights in the shapes of a model, made on the device in seconds."""

from __future__ import annotations

from typing import Any

import torch

from qkernels.bench.gpu import Place, random_weight
from qkernels.loading import Checkpoint, Weight
from qkernels.models import family_of_hf
from qkernels.nn import QuantDecoder
from qkernels.quant.spec import QuantSpec

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


class Numbers:
    """A tokenizer whose texts nobody reads."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 100 for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def make(
    place: Place, spec: QuantSpec, layers: int = 32, raw: dict[str, Any] | None = None
) -> QuantDecoder:
    """Matrices of `spec`, the head among them; the table of embeddings in the type of `place`."""
    raw = {**(raw or LLAMA_8B), "num_hidden_layers": layers}
    family = family_of_hf(raw["model_type"])
    config = family.from_hf(raw)
    weights: dict[str, Weight] = {}
    for d in family.weights(config):
        if not d.is_matrix:
            weights[d.name] = torch.ones(d.shape, device=place.device)
        elif d.name == "embed.weight":
            weights[d.name] = place.floats(*d.shape)
        else:
            packed = random_weight(spec, *d.shape, place)
            # Sums of K products of size 1 as large as those of a trained layer: 8 codes of spread.
            packed.scale.mul_(float(20 * d.shape[1] ** -0.5))
            weights[d.name] = packed
    checkpoint = Checkpoint(family, config, weights, "random weights", raw_config=raw)
    return QuantDecoder(checkpoint, tokenizer=Numbers())
