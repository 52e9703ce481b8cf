"""Model families: configuration, names of the weights and the program of each."""

from __future__ import annotations

from .config import Family, ModelConfig, RopeConfig, UnsupportedModelError, WeightDef, shown
from .gemma import GEMMA
from .llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA, GEMMA)


def family_of_hf(model_type: str) -> Family:
    """The family of a `model_type` of config.json; UnsupportedModelError lists what there is."""
    for family in FAMILIES:
        if model_type in family.hf_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.hf_types)
    raise UnsupportedModelError(
        f"model_type {shown(model_type)} is not supported; supported are {supported}"
    )


def family_of_gguf(architecture: str) -> Family:
    """The family of a `general.architecture` of GGUF; UnsupportedModelError lists what there is."""
    for family in FAMILIES:
        if architecture in family.gguf_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.gguf_types)
    raise UnsupportedModelError(
        f"GGUF architecture {shown(architecture)} is not supported; supported are {supported}"
    )


__all__ = [
    "FAMILIES",
    "Family",
    "ModelConfig",
    "RopeConfig",
    "UnsupportedModelError",
    "WeightDef",
    "family_of_gguf",
    "family_of_hf",
]
