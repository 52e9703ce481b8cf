"""The functions of whatever family a configuration belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qkernels.models import (
    FAMILIES,
    Family,
    ModelConfig,
    WeightDef,
    family_of_gguf,
    family_of_hf,
)
from qkernels.nn.program import Step


def family_of(config: ModelConfig) -> Family:
    return next(f for f in FAMILIES if config.family in (*f.hf_types, *f.gguf_types))


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    return family_of_hf(raw["model_type"]).from_hf(raw)


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Iterable[float]],
) -> ModelConfig:
    return family_of_gguf(metadata["general.architecture"]).from_gguf(metadata, shapes, read)


def weights(config: ModelConfig) -> tuple[WeightDef, ...]:
    return family_of(config).weights(config)


def program(config: ModelConfig) -> tuple[Step, ...]:
    return family_of(config).program(config)
