"""A dense layer that was changed (an adapter merged into it) back to packed, and what that cost."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .._format import columns
from ..nn.linear import QuantLinear
from ..ops.linear import default_act_group
from ..quant import PackedWeight, QuantSpec
from ..quant.quantize import block_rows, check_algo, quantize_packed
from .plan import Scheme, fitted

# Below this share of an adapter, what is left of it is worth a word.
KEPT_TO_WARN = 0.9


@dataclass(frozen=True)
class LayerMerge:
    """One packed weight [n, k] that a change D was merged into: W -> W + D -> Q.

    name: of the module. adapters: whose change it is. spec: the format of Q. error:
    ||Q - (W + D)|| / ||W + D||. change: ||D|| / ||W||. kept: the share of D that is in Q,
    <Q - W, D> / <D, D>: 1 where rounding did not take from it, near 0 where W's own codes came
    back.
    squares: ||W||^2, ||D||^2, ||W + D||^2, ||Q - (W + D)||^2 and <Q - W, D>.
    """

    adapters: tuple[str, ...]
    n: int
    k: int
    spec: str
    squares: tuple[float, float, float, float, float]
    note: str = ""
    name: str = ""

    def named(self, name: str) -> LayerMerge:
        return replace(self, name=name)

    @property
    def error(self) -> float:
        return _error([self.squares])

    @property
    def change(self) -> float:
        return _change([self.squares])

    @property
    def kept(self) -> float:
        return _kept([self.squares])


Squares = tuple[float, float, float, float, float]


def _sums(squares: list[Squares]) -> list[float]:
    return [sum(part) for part in zip(*squares, strict=True)] if squares else [0.0] * 5


def _error(squares: list[Squares]) -> float:
    _, _, wanted, lost, _ = _sums(squares)
    return (lost / wanted) ** 0.5 if wanted else 0.0


def _change(squares: list[Squares]) -> float:
    before, change, *_ = _sums(squares)
    return (change / before) ** 0.5 if before else 0.0


def _kept(squares: list[Squares]) -> float:
    _, change, _, _, along = _sums(squares)
    return along / change if change else 1.0


@dataclass(frozen=True)
class MergeReport:
    """What merging changes into packed weights cost; `str()` is a table. error, change and kept:
    as in `LayerMerge`, over all weights together."""

    layers: tuple[LayerMerge, ...]

    @property
    def error(self) -> float:
        return _error([layer.squares for layer in self.layers])

    @property
    def change(self) -> float:
        return _change([layer.squares for layer in self.layers])

    @property
    def kept(self) -> float:
        return _kept([layer.squares for layer in self.layers])

    def summary(self) -> str:
        """In one or two sentences."""
        if not self.layers:
            return "nothing was merged into packed layers"
        worst = max(self.layers, key=lambda layer: layer.error)
        count = len(self.layers)
        text = (
            f"{count} packed layer{'s' if count > 1 else ''} quantized again, relative error "
            f"{self.error:.2%} (most in {worst.name or 'a layer'}, {worst.error:.2%}); the "
            f"adapters change the weights by {self.change:.2%}, of which {self.kept:.0%} is kept"
        )
        if self.kept < KEPT_TO_WARN:
            text += (
                ". Rounding took the rest: merge into more bits "
                "(qkernels.peft.merge_and_unload(model, spec)), or keep the adapters apart"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        layers = [
            {**asdict(layer), "error": layer.error, "change": layer.change, "kept": layer.kept}
            for layer in self.layers
        ]
        return {"layers": layers, "error": self.error, "change": self.change, "kept": self.kept}

    def __str__(self) -> str:
        if not self.layers:
            return self.summary()
        head = ("layer", "[N, K]", "format", "adapters", "error", "change", "kept", "note")
        rows = [
            (
                layer.name,
                f"[{layer.n}, {layer.k}]",
                layer.spec,
                ", ".join(layer.adapters),
                f"{layer.error:.2%}",
                f"{layer.change:.2%}",
                f"{layer.kept:.0%}",
                layer.note,
            )
            for layer in self.layers
        ]
        return f"{self.summary()}\n\n{columns([head, *rows])}"


def fold(
    layer: QuantLinear,
    dense: nn.Linear,
    spec: Scheme | None,
    algo: str,
    adapters: tuple[str, ...],
) -> tuple[QuantLinear, LayerMerge]:
    """A copy of `layer` that holds `dense`, whose weight is float32 [N, K], and what that cost.

    spec: None: the layer's own, its groups of columns included. `layer` is left as it is. Raises
    ValueError for values that are not finite, and for a format or algorithm that does not exist.
    """
    check_algo(algo)
    old, note, g_idx = layer.packed, "", None
    if spec is None:
        chosen = old.spec
        g_idx = old.unpack().g_idx
    else:
        chosen, note = fitted(_spec(spec), old.k)
    bias = dense.bias
    if bias is not None and not torch.isfinite(bias).all():
        raise ValueError(f"merge: the bias with {', '.join(adapters)} is not finite")
    what = f"merge: the weight with {', '.join(adapters)}"
    packed = quantize_packed(dense.weight, chosen, g_idx=g_idx, algo=algo, name=what)
    squares = _measured(old, dense.weight.detach(), packed)
    cost = LayerMerge(adapters, packed.n, packed.k, str(chosen), squares, note)
    return _holding(layer, packed, bias), cost


def _spec(spec: Scheme) -> QuantSpec:
    return spec if isinstance(spec, QuantSpec) else QuantSpec.from_scheme(spec)


def _holding(layer: QuantLinear, packed: PackedWeight, bias: torch.Tensor | None) -> QuantLinear:
    new = copy.copy(layer)
    for store in ("_parameters", "_buffers", "_modules"):
        new.__dict__[store] = dict(new.__dict__[store])
    new._hold(packed, layer.float_dtype)
    new._replaced = layer._replaced
    new._act_group = default_act_group(packed)
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias.detach().float(), requires_grad=False)
    return new


def _measured(old: PackedWeight, wanted: torch.Tensor, new: PackedWeight) -> Squares:
    """`LayerMerge.squares`, in row blocks."""
    sums = torch.zeros(5, dtype=torch.float64, device=wanted.device)
    rows = block_rows(old.k)
    for start in range(0, old.n, rows):
        stop = min(start + rows, old.n)
        before = old.slice_rows(start, stop).dequantize()
        after = new.slice_rows(start, stop).dequantize()
        exact = wanted[start:stop]
        change = exact - before
        parts = (
            (before, before),
            (change, change),
            (exact, exact),
            (after - exact, after - exact),
            (after - before, change),
        )
        sums += torch.stack([(a.double() * b.double()).sum() for a, b in parts])
    return tuple(sums.tolist())
