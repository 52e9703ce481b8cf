"""Weights that several modules of a transformers model share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import nn


class Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the modules that hold a packed weight."""


Slot = TypeVar("Slot", bound=Named)


@contextmanager
def tied(model: Any) -> Iterator[None]:
    """The model with its ties, which transformers leaves for after it has loaded the weights."""
    before: list[tuple[nn.Module, str, Any]] = []
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        before.append((module, part, module._parameters[part]))
        module._parameters[part] = model.get_parameter(source)
    try:
        yield
    finally:
        for module, part, parameter in before:
            module._parameters[part] = parameter


def untie(model: Any, slots: Iterable[Slot]) -> dict[str, Slot]:
    """Takes modules that get a packed weight of their own out of the ties of the model: the others
    stay dense. Returns the slots by the names of the dense parameters that they were tied to.

    Raises ValueError where more is tied than a head and a table, as config.json has one flag for
    all of it.
    """
    packed = {f"{name}.weight": slot for slot in slots for name in slot.names}
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    apart: dict[str, Slot] = {}
    broken = []
    for name, source in ties.items():
        mine, other = packed.get(name), packed.get(source)
        if mine is other:
            continue
        broken.append(name)
        if other is None and mine is not None:
            apart[source] = mine
        elif mine is None and other is not None:
            apart[name] = other
    for name in broken:
        del ties[name]
    if broken and ties:
        raise ValueError(
            f"qkernels: {broken[0]} is to be quantized apart from what it is tied to, and "
            f"{next(iter(ties))} stays tied; load the model as it is, and use qk.quantize_"
        )
    if broken:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return apart
