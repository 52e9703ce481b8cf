"""What there is to measure, and how a few of it are chosen.

The space is the product of all shapes, widths, groups, zeros, activations and numbers of rows, some
28,000 cases. Each has a tier: QUICK is a look at one model in a minute, STANDARD (which contains
it) what is usually asked, FULL everything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache import KV_DTYPES
from ..quant.spec import BITS, QuantSpec
from .shapes import MODELS, ModelShapes

QUICK, STANDARD, FULL = 0, 1, 2
QUICK_MODEL = "SmolLM2-135M"

GROUPS = (32, 64, 128, 256)
ZEROS = ("symmetric", "integer", "minimum")
ROWS = (1, 2, 4, 8, 16, 64, 128, 512, 2048)
CONTEXTS = (128, 512, 2048, 4096, 8192, 32768)
CHUNK = 512  # new tokens of a prefill, or all of a shorter context

Q4_K = QuantSpec(4, 32, "int8", "minimum")
# Q4_1 of GGUF, what GPTQ and compressed-tensors files usually have, Q8_0, Q4_K.
USUAL = (QuantSpec(4, 32, zero="minimum"), QuantSpec(4, 128), QuantSpec(8, 32), Q4_K)
# A scale per row: the product of torch's _int_mm, and its scales.
W8_ROW = QuantSpec(8, -1)
SPECS = (
    *(QuantSpec(b, g, zero=zero) for b in BITS for g in GROUPS for zero in ZEROS),
    W8_ROW,
    Q4_K,
)


@dataclass(frozen=True)
class Case:
    """One kernel on one shape. m: rows of activations, which are tokens."""

    model: str
    m: int
    tier: int

    @property
    def kernel(self) -> str:
        raise NotImplementedError

    @property
    def detail(self) -> str:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.model} {self.detail}"

    def fields(self) -> dict[str, Any]:
        """What tells the case apart, for a row of results."""
        return {"name": self.name, "kernel": self.kernel, "model": self.model, "m": self.m}


@dataclass(frozen=True)
class LinearCase(Case):
    """y [m, n] = x [m, k] times a packed weight [n, k]; act "int8" quantizes x first."""

    layer: str
    n: int
    k: int
    spec: QuantSpec
    act: str

    @property
    def kernel(self) -> str:
        return "linear"

    @property
    def weight(self) -> str:
        return "Q4_K" if self.spec == Q4_K else str(self.spec).replace(" float16", "")

    @property
    def detail(self) -> str:
        return f"{self.layer} [{self.n}, {self.k}] {self.weight} act {self.act} M={self.m}"

    @property
    def nbytes(self) -> float:
        """Bytes of the weight in a file: those of Q4_K have scales and minima of 6 bits, which are
        kept as bytes in memory."""
        bits = 4.5 if self.spec == Q4_K else self.spec.bits_per_weight
        return self.n * self.k * bits / 8

    def fields(self) -> dict[str, Any]:
        own = {"layer": self.layer, "n": self.n, "k": self.k}
        kind = {"weight": self.weight, "bits": self.spec.bits, "group": self.spec.group_size}
        return {**super().fields(), **own, **kind, "zero": self.spec.zero, "act": self.act}


@dataclass(frozen=True)
class AttentionCase(Case):
    """m new tokens (decode: 1), the last of `context` keys of one sequence in a paged cache."""

    context: int
    kv_dtype: str

    @property
    def kernel(self) -> str:
        return "attention_decode" if self.m == 1 else "attention_prefill"

    @property
    def detail(self) -> str:
        return f"context {self.context} KV {self.kv_dtype} M={self.m}"

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "context": self.context, "kv_dtype": self.kv_dtype}


@dataclass(frozen=True)
class NormCase(Case):
    """RMSNorm, or LayerNorm with a bias (center), of x [m, k], to float32 or to int8."""

    k: int
    center: bool
    quantized: bool

    @property
    def kernel(self) -> str:
        return "layer_norm" if self.center else "rms_norm"

    @property
    def detail(self) -> str:
        return f"[{self.m}, {self.k}]{' to int8' if self.quantized else ''} M={self.m}"

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "k": self.k, "act": "int8" if self.quantized else "float"}


def _linear_tier(layer: str, spec: QuantSpec, act: str, m: int) -> int:
    usual = spec in USUAL
    if usual and layer == "down" and m in (1, 16, 512) and (act == "int8" or spec == USUAL[0]):
        return QUICK
    every_matrix = usual and act == "int8" and m in (1, 4, 16, 64, 512)
    one_matrix = usual and layer == "down"
    every_weight = (
        layer == "down"
        and act == "int8"
        and m in (1, 512)
        and (spec.zero == "symmetric" or spec.group_size == 32)
    )
    return STANDARD if every_matrix or one_matrix or every_weight else FULL


def _linear(model: ModelShapes) -> Iterator[LinearCase]:
    for layer, (n, k) in model.matrices().items():
        for spec in SPECS:
            for act in ("int8", "float"):
                for m in ROWS:
                    tier = _linear_tier(layer, spec, act, m)
                    yield LinearCase(model.name, m, tier, layer, n, k, spec, act)


def _attention(model: ModelShapes) -> Iterator[AttentionCase]:
    for context in CONTEXTS:
        for kv_dtype in KV_DTYPES:
            for m in (1, min(CHUNK, context)):
                usual = kv_dtype in ("float16", "int8", "int4")
                look = context == (4096 if m == 1 else 512)
                yield AttentionCase(
                    model.name, m, QUICK if usual and look else STANDARD, context, kv_dtype
                )


def _norms(model: ModelShapes) -> Iterator[NormCase]:
    for center in (False, True):
        for quantized in (False, True):
            for m in ROWS:
                tier = QUICK if m == 512 else STANDARD if m in (1, 16, 2048) else FULL
                yield NormCase(model.name, m, tier, model.hidden, center, quantized)


def every_case(models: Iterable[str] = tuple(MODELS)) -> Iterator[Case]:
    """All cases of these models, in the order of a report."""
    for name in models:
        yield from _linear(MODELS[name])
        yield from _attention(MODELS[name])
        yield from _norms(MODELS[name])


def select(
    *,
    models: Sequence[str] = (),
    kernel: str | None = None,
    rows: Sequence[int] = (),
    tier: int = STANDARD,
) -> list[Case]:
    """The cases of a tier and those below it that fit.

    models: names as in `MODELS`, whatever their letters' case; none: all of them, in the QUICK tier
    `QUICK_MODEL`. kernel: a regular expression that is searched for in the name of a case, such as
    "linear .*down.* W4 g32" or "attention.*int8". rows: values of M. Raises ValueError for a model
    or a number of rows that is not there, a bad expression, and a selection that is empty.
    """
    if strange := sorted(set(rows) - set(ROWS)):
        raise ValueError(f"no case has M {strange}; M may be {list(ROWS)}")
    chosen = [_model(name) for name in models]
    if not chosen:
        chosen = [QUICK_MODEL] if tier == QUICK else list(MODELS)
    try:
        pattern = re.compile(kernel or "")
    except re.error as error:
        raise ValueError(f"{kernel!r} is not a regular expression: {error}") from error
    fits = [
        case
        for case in every_case(chosen)
        if pattern.search(case.name) and (not rows or case.m in rows)
    ]
    found = [case for case in fits if case.tier <= tier]
    if not found:
        asked = f"kernel {kernel!r}, M {list(rows) or 'any'}, models {', '.join(chosen)}"
        more = f"; {len(fits)} of a larger tier do" if fits else ""
        raise ValueError(f"no case of this selection fits {asked}{more}")
    return found


def _model(name: str) -> str:
    by_lower = {known.lower(): known for known in MODELS}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    hint = f"; did you mean {by_lower[near[0]]}?" if near else ""
    raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}{hint}")
