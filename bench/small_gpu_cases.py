"""One small call of every op on a GPU, of every kind of kernel it has: for compute-sanitizer, under
which all is slow. Says what it ran; ends with 1 where an op gives what is not a number.

    compute-sanitizer --tool memcheck python bench/small_gpu_cases.py [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from qkernels import ops
from qkernels.bench import inputs
from qkernels.cache import PagedKVCache, rope_table
from qkernels.quant.spec import QuantSpec

SPECS = (
    QuantSpec(4, 32, zero="minimum"),
    QuantSpec(4, 128, zero="integer"),
    QuantSpec(8, 32),
    QuantSpec(4, 32, "int8", "minimum"),
    QuantSpec(6, 16, "int8"),
    QuantSpec(3, 32),
)
Case = tuple[str, torch.Tensor]


def linears(device: torch.device) -> Iterator[Case]:
    for spec in SPECS:
        weight = inputs.random_weight(spec, 200, 512).to(device)
        for m in (1, 5, 40):
            x = torch.randn(m, 512, device=device).bfloat16()
            for act in ("float", "int8"):
                yield f"linear {spec} act {act} M={m}", ops.linear(x, weight, act=act)
        ids = torch.tensor([0, 199, 7], device=device)
        yield f"embedding {spec}", ops.embedding(ids, weight, torch.bfloat16)
        yield f"dequantize {spec}", weight.dequantize(torch.bfloat16)


def rows(device: torch.device) -> Iterator[Case]:
    x = torch.randn(5, 640, device=device).bfloat16()
    weight = torch.ones(640, device=device)
    yield "norm", ops.norm(x, weight)
    yield "add_norm", ops.add_norm(x, x, weight)[0]
    yield "norm_quant", ops.norm_quant(x, weight, act_group=32).scale
    yield "gate", ops.gate(x, x, "silu")
    yield "gate_quant", ops.gate_quant(x, x, "gelu_tanh", act_group=32).scale
    yield "quantize_act", ops.quantize_act(x, 64).scale
    logits = torch.randn(3, 5000, device=device)
    yield "sample", ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, seed=1, offset=0)


def attentions(device: torch.device) -> Iterator[Case]:
    heads, kv_heads, dim = 8, 2, 64
    rope = rope_table(dim, 512, 1e4).to(device)
    for dtype in ("bfloat16", "int8", "int4"):
        cache = PagedKVCache(1, kv_heads, dim, dtype=dtype, max_tokens=1024, device=device)
        sequences = [cache.add(), cache.add()]
        for counts in ([100, 3], [1, 1]):
            batch = cache.reserve(sequences, counts)
            q, k, v = (
                torch.randn(sum(counts), count, dim, device=device).bfloat16()
                for count in (heads, kv_heads, kv_heads)
            )
            ragged = batch.query_start, batch.kv_len, batch.page_table
            q = ops.kv_append(q, k, v, rope, None, *ragged, *cache.layer(0))
            yield f"kv_append {dtype} {counts}", q
            yield f"attention {dtype} {counts}", ops.attention(q, *ragged, *cache.layer(0))
            both = ops.append_attention(q, k, v, rope, None, *ragged, *cache.layer(0))
            yield f"append_attention {dtype} {counts}", both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    wrong = 0
    with torch.inference_mode():
        for family in (rows, attentions, linears):
            for name, result in family(device):
                finite = bool(result.float().isfinite().all())
                wrong += not finite
                print(name, "ok" if finite else "NOT FINITE", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
