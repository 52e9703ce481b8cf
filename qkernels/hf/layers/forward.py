"""The forward of a host's decoder in a step of decoding.

What the host does around its layers (defaults, a mask, positions, recording of outputs) takes a
small model a tenth of a step. A step that asks for none of it needs none of it: the cache knows how
many tokens there are, and which of them are padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache import is_ours
from .stack import DecoderStack


class DecoderForward:
    """The forward of a decoder (embedding, layers, last norm) whose layers are replaced."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not (torch.compiler.is_compiling() or args) and self._is_step(named):
            hidden = self.decoder.embed_tokens(named["input_ids"])
            if self.decoder.layers.runs_whole(hidden, named):
                return self._step(hidden, named)
            named = {**named, "input_ids": None, "inputs_embeds": hidden}
        return type(self.decoder).forward(self.decoder, *args, **named)

    def _step(self, hidden: torch.Tensor, named: Mapping[str, Any]) -> Any:
        decoder, cache = self.decoder, named["past_key_values"]
        mask = named.get("attention_mask")
        if mask is not None:
            mask = mask.to(hidden.device)
        hidden = decoder.layers.run(
            hidden,
            None,
            attention_mask=mask,
            position_ids=named.get("position_ids"),
            past_key_values=cache,
        )
        return BaseModelOutputWithPast(decoder.norm(hidden), cache)

    def _is_step(self, named: Mapping[str, Any]) -> bool:
        """Whether this is one token more for every sequence of a cache of ours, through all layers,
        and nothing else is asked for."""
        for name, value in named.items():
            off = value is True if name == "return_dict" else value is False
            if not (value is None or name in _TAKEN or (off and name in _OPTIONS)):
                return False
        ids: Any = named.get("input_ids")
        mask: Any = named.get("attention_mask")
        decoder = self.decoder
        return (
            is_ours(named.get("past_key_values"))
            and (_is_rows(ids) and ids.shape[1] == 1 and ids.shape[0] > 0)
            and (mask is None or _is_rows(mask))
            and isinstance(decoder.layers, DecoderStack)
            and decoder.config.num_hidden_layers == len(decoder.layers)
            and (named.get("return_dict") is not None or bool(decoder.config.return_dict))
        )


_TAKEN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
# Arguments that ask for nothing when they are off.
_OPTIONS = ("return_dict", "output_attentions", "output_hidden_states")


def _is_rows(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 2
