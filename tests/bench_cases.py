"""Small cases of qkernels/bench."""

from __future__ import annotations

from qkernels import bench
from qkernels.bench.cases import AttentionCase, LinearCase, NormCase
from qkernels.bench.inputs import Rotation
from qkernels.quant.spec import QuantSpec

SMALL = Rotation(cache=1 << 16, limit=1 << 24)
MODEL = "SmolLM2-135M"


def linear_case(spec: QuantSpec, act: str = "int8", m: int = 3) -> LinearCase:
    return LinearCase(MODEL, m, bench.QUICK, "tiny", 72, 160, spec, act)


def attention_case(kv_dtype: str, m: int = 1, context: int = 100) -> AttentionCase:
    return AttentionCase(MODEL, m, bench.QUICK, context, kv_dtype)


def norm_case(center: bool, quantized: bool) -> NormCase:
    return NormCase(MODEL, 3, bench.QUICK, 100, center, quantized)


TINY = [
    linear_case(QuantSpec(4, 32, zero="minimum")),
    attention_case("int8"),
    norm_case(True, True),
]
