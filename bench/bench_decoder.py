"""Decode and prefill of a decoder, by activation mode and KV type, against the read bandwidth of
the machine.

    python bench/bench_decoder.py MODEL [--threads 2] [--combinations int8:float16 float:float32
    ...] [--rounds 5] python bench/bench_decoder.py MODEL --perplexity TEXT --reference 46.895

MODEL: GGUF file, directory or PACKAGE:FILE. All combinations are loaded first; the rounds go over
all of them in turn, and a measurement of the read bandwidth comes before every round, so that each
meets the same machine. Prompts are random ids, new in every round.

Bytes of the percentage: the weights that a step reads, as packed, which is within 3% of the
checkpoint's own bytes (the smaller of the two counts), plus the keys and values at the mean
context.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch

import qkernels as qk
from qkernels.cli.source import model_path, read_text
from qkernels.cli.traffic import bytes_per_step
from qkernels.evaluate import perplexity

DEFAULT = ["int8:float16", "int8:int8", "int8:int4", "float:float16", "float:float32"]
DECODE_PROMPT = 32


def bytes_read(decoder: Any, path: Path, context: int) -> int:
    """Bytes of a decode step; padding and other waste of the packed form earn nothing."""
    weights, kv = bytes_per_step(decoder, context)
    if path.is_file():
        weights = min(weights, path.stat().st_size)
    return weights + kv


def speeds(decoders: dict[tuple[str, str], Any], path: Path, options: argparse.Namespace) -> Any:
    rng = random.Random(0)
    samples: dict[Any, dict[str, list[float]]] = {
        k: {"prefill": [], "decode": []} for k in decoders
    }
    bandwidths = []
    for turn in range(options.rounds + 1):  # the first warms up
        bandwidths.append(record.read_bandwidth(repeats=3))
        for key, decoder in decoders.items():
            vocab = decoder.config.vocab
            prompt = [rng.randrange(vocab) for _ in range(options.prefill)]
            greedy = {"temperature": 0, "stop_at_eos": False}
            long = decoder.generate([prompt], max_new_tokens=1, **greedy).timings
            short = decoder.generate(
                [prompt[:DECODE_PROMPT]], max_new_tokens=options.decode, **greedy
            ).timings
            if turn:
                samples[key]["prefill"].append(long.prefill_tokens_per_second)
                samples[key]["decode"].append(short.decode_tokens_per_second)
    ceiling = median(bandwidths)
    rows = []
    for (act, kv_dtype), decoder in decoders.items():
        taken = samples[act, kv_dtype]
        step = bytes_read(decoder, path, DECODE_PROMPT + options.decode // 2)
        rate = step * median(taken["decode"]) / 1e9
        row = {"act": act, "kv_dtype": kv_dtype, "bytes_per_token": step}
        row |= {name: record.summary(values) for name, values in taken.items()}
        row |= {"gb_per_s": round(rate, 2), "percent_of_read": round(100 * rate / ceiling, 1)}
        rows.append(row)
        print(
            f"act {act:5} kv {kv_dtype:8}  prefill {options.prefill}: "
            f"{row['prefill']['median']:8.1f} tok/s   "
            f"decode {options.decode}: {row['decode']['median']:7.1f} tok/s, "
            f"{rate:.1f} of {ceiling:.1f} GB/s ({row['percent_of_read']:.0f}%)"
        )
    return {
        "read_gb_per_s": round(ceiling, 2),
        "prefill": options.prefill,
        "decode": options.decode,
        "rows": rows,
    }


def accuracies(decoders: dict[tuple[str, str], Any], options: argparse.Namespace) -> Any:
    text = read_text(options.perplexity)
    rows = []
    for (act, kv_dtype), decoder in decoders.items():
        result = perplexity(decoder, text, window=options.window, windows=options.windows)
        rows.append({"act": act, "kv_dtype": kv_dtype, "perplexity": round(result.value, 4)})
        print(f"act {act:5} kv {kv_dtype:8}  perplexity {result.value:.4f}")
    what = f"{options.perplexity.name}, {options.windows} windows of {options.window} tokens"
    return {"text": what, "reference": options.reference, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--combinations", nargs="+", default=DEFAULT, metavar="ACT:KV")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument(
        "--perplexity", type=Path, metavar="TEXT", help="measure accuracy instead of speed"
    )
    parser.add_argument("--reference", type=float, help="perplexity of the float32 model on TEXT")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--name", help="name of the result file; default: by kind and model")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if (options.perplexity is None) != (options.reference is None):
        parser.error("--perplexity and --reference come together")

    torch.set_num_threads(options.threads)
    path = model_path(options.model)
    context = max(options.prefill, DECODE_PROMPT + options.decode, options.window) + 1
    decoders = {}
    for combination in options.combinations:
        act, _, kv_dtype = combination.partition(":")
        decoders[act, kv_dtype] = qk.QuantDecoder.from_pretrained(
            path, act=act, kv_dtype=kv_dtype, max_seq_len=context
        )
    kind = "decoder" if options.perplexity is None else "accuracy"
    body = speeds(decoders, path, options) if kind == "decoder" else accuracies(decoders, options)
    if not options.no_write:
        name = options.name or f"{kind}-{path.stem.lower()}"
        print(record.write(name, kind, options.threads, {"model": path.name, **body}))


if __name__ == "__main__":
    main()
