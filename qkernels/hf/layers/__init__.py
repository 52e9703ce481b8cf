"""Whole decoder layers of a transformers model, run by our programs."""

from .replace import replace_decoder_layers_, restore_decoder_layers_
