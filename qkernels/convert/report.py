"""What `quantize_` did, counted in parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .._format import amount, columns

DENSE_SHARE_TO_WARN = 0.05  # of the parameters


class QuantWarning(UserWarning):
    """Much of a model stays dense."""


@dataclass(frozen=True)
class LayerReport:
    """One weight that was quantized, [n, k].

    names: the modules that hold it, a tied one under all its names. kind: the class it replaced.
    act: "int8", "float" or "auto" (by device), "-" for an embedding. nbytes_before, nbytes: of the
    weight. error: ||W - dequantized|| / ||W||. note: where the format differs from what was asked.
    """

    names: tuple[str, ...]
    kind: str
    n: int
    k: int
    spec: str
    act: str
    algo: str
    nbytes_before: int
    nbytes: int
    error: float
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module with a weight that was left as it is. params: of its weight."""

    name: str
    kind: str
    params: int
    reason: str


@dataclass(frozen=True)
class DenseTensor:
    """A parameter that stays dense."""

    name: str
    shape: tuple[int, ...]
    params: int
    nbytes: int
    what: str


@dataclass(frozen=True)
class QuantReport:
    """What `quantize_` did; `str()` is a table.

    params: of the whole model, tied ones once; params_quantized: of those, the ones that are packed
    now, by this call or before. nbytes_before, nbytes: of all parameters and buffers.
    linear_nbytes_before, linear_nbytes: of the weights of the linear layers that were quantized.
    dense: the parameters that stay dense, largest first. notes: what else to know.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    dense: tuple[DenseTensor, ...]
    notes: tuple[str, ...]
    params: int
    params_quantized: int
    nbytes_before: int
    nbytes: int
    linear_nbytes_before: int
    linear_nbytes: int

    @property
    def share(self) -> float:
        """The share of the parameters that is quantized."""
        return self.params_quantized / self.params if self.params else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight of this call, scales and padding included; 0 without any."""
        weights = sum(layer.n * layer.k for layer in self.layers)
        return 8 * sum(layer.nbytes for layer in self.layers) / weights if weights else 0.0

    @property
    def bits_per_param(self) -> float:
        """Bits per parameter of the whole model."""
        return 8 * self.nbytes / self.params if self.params else 0.0

    @property
    def error(self) -> float:
        """The largest relative error of a layer; 0 without any."""
        return max((layer.error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "share": self.share, "bits_per_weight": self.bits_per_weight}

    def dense_warning(self) -> str | None:
        """What to warn of: that more than 5% of the parameters stay dense, and which."""
        if not self.params or 1 - self.share <= DENSE_SHARE_TO_WARN:
            return None
        largest = "; ".join(
            f"{d.name} {list(d.shape)} ({d.params / self.params:.0%}"
            + (f", {d.what})" if d.what else ")")
            for d in self.dense[:3]
        )
        return (
            f"quantize_: {1 - self.share:.0%} of the {_count(self.params)} parameters stay dense. "
            f"The largest: {largest}"
        )

    def __str__(self) -> str:
        facts = [
            (
                "quantized",
                f"{_count(self.params_quantized)} of {_count(self.params)} parameters "
                f"({self.share:.1%})",
            ),
            (
                "whole model",
                f"{amount(self.nbytes_before)} -> {amount(self.nbytes)} "
                f"({self.bits_per_param:.2f} bits per parameter)",
            ),
            (
                "linear layers",
                f"{amount(self.linear_nbytes_before)} -> {amount(self.linear_nbytes)}",
            ),
            ("quantized weights", f"{self.bits_per_weight:.2f} bits per weight"),
        ]
        parts = [columns(facts)]
        if self.layers:
            head = ("layer", "[N, K]", "format", "act", "by", "error", "note")
            rows = [
                (
                    " = ".join(layer.names),
                    f"[{layer.n}, {layer.k}]",
                    layer.spec,
                    layer.act,
                    layer.algo,
                    f"{layer.error:.2%}",
                    layer.note,
                )
                for layer in self.layers
            ]
            parts.append(columns([head, *rows]))
        if self.skipped:
            left = [(s.name, s.kind, _count(s.params), s.reason) for s in self.skipped]
            parts.append(columns([("left as it is", "class", "parameters", "because"), *left]))
        if self.dense:
            large = [(d.name, str(list(d.shape)), amount(d.nbytes), d.what) for d in self.dense[:8]]
            parts.append(columns([("largest dense", "shape", "size", ""), *large]))
        parts.extend(self.notes)
        return "\n\n".join(parts)


def _count(params: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if params >= size:
            return f"{params / size:.1f}{unit}"
    return str(params)
