"""In transformers: a quantizer, an attention function, a quantized cache, decoder layers of ours.

Importing this module does not import transformers; asking for one of its names does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .versions import HostVersionError, require

# Public name -> the module here that has it.
_NAMES: dict[str, str] = {
    "QKernelsConfig": "quantizer",
    "give_back": "takeover",
    "register": "quantizer",
    "replace_decoder_layers_": "layers",
    "restore_decoder_layers_": "layers",
    "take_over": "takeover",
    "taken_over": "takeover",
}

__all__ = ["HostVersionError"]  # and _NAMES


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("transformers")
    import_module(".quantizer", __name__).register()
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
