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


class DecoderForward:
    """The forward of a decoder (embedding, layers, last norm) whose layers are replaced."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        **named: Any,
    ) -> Any:
        decoder = self.decoder
        if (
            is_ours(past_key_values)
            and _is_step(input_ids)
            and inputs_embeds is None
            and (attention_mask is None or _is_rows(attention_mask))
            and not self._asks(named)
            and not torch.compiler.is_compiling()
        ):
            hidden = decoder.embed_tokens(input_ids)
            step = {
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
            }
            if decoder.layers.runs_whole(hidden, {**named, **step}):
                hidden = decoder.layers.run(hidden, None, **step)
                return BaseModelOutputWithPast(decoder.norm(hidden), past_key_values)
            input_ids, inputs_embeds = None, hidden
        return type(decoder).forward(
            decoder,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **named,
        )

    def _asks(self, named: Mapping[str, Any]) -> bool:
        """Whether these are for the host to look at."""
        for name, value in named.items():
            off = value is True if name == "return_dict" else value is False
            if value is not None and not (off and name in _OPTIONS):
                return True
        return named.get("return_dict") is None and not self.decoder.config.return_dict


# Arguments that ask for nothing when they are off.
_OPTIONS = ("return_dict", "output_attentions", "output_hidden_states")


def _is_rows(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 2


def _is_step(ids: Any) -> bool:
    return _is_rows(ids) and ids.shape[1] == 1 and ids.shape[0] > 0
