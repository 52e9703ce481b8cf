"""Checkpoints of other methods, loaded by stock `from_pretrained` onto packed layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

from ..checkpoints.formats import FORMATS
from ..ops.linear import ACTS
from .quantizer import QKernelsConfig, register
from .stored import NOTE

GGUF = "gguf"
METHODS = ("gptq", "awq", "compressed-tensors", GGUF)
_OWN = "compressed-tensors"

# What was in transformers' tables before, by method and table, and the `act` asked for.
_before: dict[str, Any] = {}


def take_over(*methods: str, act: str = "auto") -> None:
    """Makes stock `from_pretrained` load checkpoints of these methods onto packed layers: "gptq",
    "awq", "compressed-tensors" and "gguf" (given as `gguf_file=`), without the packages that
    transformers needs for them.

    Values are exactly those of the checkpoint. act: of the linear layers: "int8" quantizes
    activations at run time (fast on a CPU), "float" does not, "auto" does what the checkpoint says:
    "int8" for compressed-tensors with int8 activations, else "float".

    Raises ValueError for an unknown method, and for one that is taken over already; then none is.
    """
    if not methods:
        raise ValueError(f"take_over: name one or more of {', '.join(METHODS)}")
    if act not in ("auto", *ACTS):
        raise ValueError(f"take_over: act must be auto, int8 or float, got {act!r}")
    _check(methods, "take_over")
    for i, method in enumerate(methods):
        if method in _before or method in methods[:i]:
            raise ValueError(f"take_over: {method!r} is taken over already; see give_back")
    register()
    for method in methods:
        if method == GGUF:
            from .gguf import quantizer_class

            _before[method] = AUTO_QUANTIZER_MAPPING[method]
            AUTO_QUANTIZER_MAPPING[method] = quantizer_class(act)
        else:
            _before[method] = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _config_class(act)


def give_back(*methods: str) -> None:
    """Undoes `take_over`; without names, for all. Models that are loaded stay as they are. Raises
    ValueError for a method that is not taken over."""
    _check(methods, "give_back")
    for method in methods:
        if method not in _before:
            raise ValueError(f"give_back: {method!r} is not taken over")
    for method in methods or [*_before]:
        table: Any = AUTO_QUANTIZER_MAPPING if method == GGUF else AUTO_QUANTIZATION_CONFIG_MAPPING
        table[method] = _before.pop(method)


@contextmanager
def taken_over(*methods: str, act: str = "auto") -> Iterator[None]:
    """`take_over` within a `with` block."""
    take_over(*methods, act=act)
    try:
        yield
    finally:
        give_back(*methods)


def _check(methods: tuple[str, ...], what: str) -> None:
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"{what}: unknown method {method!r}; known are {', '.join(METHODS)}")


def _config_class(act: str) -> type:
    """What stands in transformers' table of configurations: it makes ours, and with it comes our
    quantizer."""

    class TakenOver(QKernelsConfig):
        @classmethod
        def from_dict(
            cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
        ) -> Any:
            config = QKernelsConfig.of_stored(config_dict, act)
            return (config, kwargs) if return_unused_kwargs else config

    return TakenOver


def recognise_own() -> None:
    """Lets what `save_pretrained` wrote as compressed-tensors load onto packed layers again, by the
    note in it; other checkpoints of that method go where they went before."""
    stock: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[_OWN]

    class OwnOrStock(stock):  # type: ignore[misc]
        @classmethod
        def from_dict(
            cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
        ) -> Any:
            if NOTE in config_dict:
                config = QKernelsConfig.of_stored(config_dict)
                return (config, kwargs) if return_unused_kwargs else config
            return stock.from_dict(config_dict, return_unused_kwargs, **kwargs)

    OwnOrStock.__name__ = stock.__name__  # transformers compares names
    AUTO_QUANTIZATION_CONFIG_MAPPING[_OWN] = OwnOrStock


assert set(METHODS) - {GGUF} <= set(FORMATS)
