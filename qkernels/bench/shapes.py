"""Sizes of the models whose matrices, heads and rows are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShapes:
    """A decoder, as far as its kernels see it."""

    name: str
    hidden: int
    ffn: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each linear layer; v is like k, up like gate, and equal shapes stand once."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        every = {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
            "head": (self.vocab, self.hidden),
        }
        once: dict[str, tuple[int, int]] = {}
        for layer, shape in every.items():
            if shape not in once.values():
                once[layer] = shape
        return once


MODELS = {
    model.name: model
    for model in (
        ModelShapes("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
        ModelShapes("Gemma-3-270M", 640, 2048, 4, 1, 256, 262144),
        ModelShapes("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256),
        ModelShapes("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256),
    )
}
