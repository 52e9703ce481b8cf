"""A decoder end to end, against the read bandwidth of the machine.

    python bench/bench_decoder.py MODEL [--threads 2] [--rounds 5] [--combinations int8:float16 ...]
    python bench/bench_decoder.py MODEL --sweep [--contexts 128 ...] [--batches 1 2 ...]
    python bench/bench_decoder.py MODEL --perplexity TEXT --reference 46.895

The first goes over activation modes and KV types, the second over context lengths and batches with
int8 activations, the third measures accuracy. MODEL: GGUF file, directory or PACKAGE:FILE. All
combinations are loaded first; the rounds go over all of them in turn, every other one backwards,
and a measurement of the read bandwidth comes before every round, so that each meets the same
machine. Prompts are random ids, new in every round.

Bytes of the percentage: the weights that a step reads, as stored or as packed, whichever is less,
plus the keys and values of every sequence at its mean context.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
from footprint import footprint, read_ceiling

import qkernels as qk
from qkernels.cli.source import model_path, read_text
from qkernels.cli.traffic import bytes_per_step
from qkernels.evaluate import perplexity

DEFAULT = ["int8:float16", "int8:int8", "int8:int4", "float:float16", "float:float32"]
DECODE_PROMPT = 32


SWEEP_KV = ("int8", "float16")
BATCH_CONTEXT = 128  # tokens of each prompt where batches are compared
_LOADS = 3  # per KV type
Item = TypeVar("Item")
_GREEDY = {"temperature": 0, "stop_at_eos": False}


def bytes_read(decoder: Any, path: Path, context: int, batch: int = 1) -> int:
    """Bytes of a decode step; padding and other waste of the packed form earn nothing."""
    weights, kv = bytes_per_step(decoder, context)
    if path.is_file():
        weights = min(weights, footprint(path).weight_bytes)
    return weights + batch * kv


@dataclass
class Point:
    """Prompts of `context` tokens, `batch` of them, and what was measured there."""

    kv_dtype: str
    batch: int
    context: int
    prefill: list[float] = field(default_factory=list)  # tokens/s
    first_token: list[float] = field(default_factory=list)  # seconds from the call to any token
    decode: list[float] = field(default_factory=list)  # tokens/s, all sequences together

    def take(self, decoder: Any, prompts: list[list[int]], new: int, keep: bool) -> None:
        timings = decoder.generate(prompts, max_new_tokens=new, **_GREEDY).timings
        if keep:
            self.prefill.append(timings.prefill_tokens_per_second)
            self.first_token.append(timings.first_token)
            self.decode.append(timings.decode_tokens_per_second)


def points(contexts: list[int], batches: list[int]) -> list[Point]:
    """Every context with one sequence, every batch at BATCH_CONTEXT, for each KV type."""
    sizes = [(1, context) for context in contexts] + [(b, BATCH_CONTEXT) for b in batches]
    return [Point(kv, *size) for kv in SWEEP_KV for size in dict.fromkeys(sizes)]


def turned(items: Sequence[Item], turn: int) -> Sequence[Item]:
    """The order of a round: every other one goes backwards, so that a machine that slows down, or
    gets faster, does so for both ends alike."""
    return items[::-1] if turn % 2 else items


def sweep(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows by context and batch, and the time that loading takes with the file in the page
    cache."""
    longest = max([*options.contexts, BATCH_CONTEXT]) + options.decode + 1
    decoders, loads = {}, []
    for kv_dtype in SWEEP_KV:
        for _ in range(_LOADS):
            decoders.pop(kv_dtype, None)  # first: two may not fit
            decoders[kv_dtype] = qk.QuantDecoder.from_pretrained(
                path, act="int8", kv_dtype=kv_dtype, max_seq_len=longest
            )
            loads.append(decoders[kv_dtype].load_seconds)
    rng = random.Random(0)
    measured, bandwidths = points(options.contexts, options.batches), []
    for turn in range(options.rounds + 1):  # the first warms up
        bandwidths.append(record.read_bandwidth(repeats=3))
        for point in turned(measured, turn):
            decoder = decoders[point.kv_dtype]
            vocab, lengths = decoder.config.vocab, [point.context] * point.batch
            prompts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
            point.take(decoder, prompts, options.decode, keep=turn > 0)
    ceiling = read_ceiling(bandwidths)
    rows = []
    for point in measured:
        context = point.context + options.decode // 2
        step = bytes_read(decoders[point.kv_dtype], path, context, point.batch)
        row = sweep_row(point, step, ceiling["read_ceiling_gb_per_s"])
        rows.append(row)
        print(sweep_line(row))
    found = {"act": "int8", "decode": options.decode, "load_seconds": record.summary(loads)}
    return {**ceiling, **found, "rows": rows}


def sweep_row(point: Point, step_bytes: int, ceiling: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kv_dtype": point.kv_dtype,
        "batch": point.batch,
        "context": point.context,
        "bytes_per_step": step_bytes,
    }
    for what in ("prefill", "first_token", "decode"):
        row[what] = record.summary(getattr(point, what))
    rate = step_bytes * row["decode"]["median"] / point.batch / 1e9
    return row | {"gb_per_s": round(rate, 2), "percent_of_read": round(100 * rate / ceiling, 1)}


def sweep_line(row: dict[str, Any]) -> str:
    return (
        f"kv {row['kv_dtype']:8} batch {row['batch']} context {row['context']:5}  "
        f"prefill {row['prefill']['median']:8.1f} tok/s, first token of any sequence after "
        f"{row['first_token']['median']:.3f} s   decode {row['decode']['median']:7.1f} tok/s, "
        f"{row['gb_per_s']:.1f} GB/s ({row['percent_of_read']:.0f}%)"
    )


def speeds(decoders: dict[tuple[str, str], Any], path: Path, options: argparse.Namespace) -> Any:
    rng = random.Random(0)
    samples: dict[Any, dict[str, list[float]]] = {
        k: {"prefill": [], "first_token": [], "decode": []} for k in decoders
    }
    bandwidths = []
    for turn in range(options.rounds + 1):  # the first warms up
        bandwidths.append(record.read_bandwidth(repeats=3))
        for key, decoder in turned(list(decoders.items()), turn):
            vocab = decoder.config.vocab
            prompt = [rng.randrange(vocab) for _ in range(options.prefill)]
            long = decoder.generate([prompt], max_new_tokens=1, **_GREEDY).timings
            short = decoder.generate(
                [prompt[:DECODE_PROMPT]], max_new_tokens=options.decode, **_GREEDY
            ).timings
            if turn:
                samples[key]["prefill"].append(long.prefill_tokens_per_second)
                samples[key]["first_token"].append(long.first_token)
                samples[key]["decode"].append(short.decode_tokens_per_second)
    read = read_ceiling(bandwidths)
    ceiling = read["read_ceiling_gb_per_s"]
    rows = []
    for (act, kv_dtype), decoder in decoders.items():
        taken = samples[act, kv_dtype]
        step = bytes_read(decoder, path, DECODE_PROMPT + options.decode // 2)
        rate = step * record.summary(taken["decode"])["median"] / 1e9
        row = {"act": act, "kv_dtype": kv_dtype, "bytes_per_token": step}
        row["load_seconds"] = round(decoder.load_seconds, 3)
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
        **read,
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
    parser.add_argument("--sweep", action="store_true", help="by context and batch")
    contexts, batches = [128, 512, 1024, 2048, 4096], [1, 2, 4, 8]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts)
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
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

    if options.sweep and options.perplexity is not None:
        parser.error("--sweep measures speed and --perplexity accuracy: one at a time")
    if options.rounds < 5:
        parser.error(f"a median needs at least 5 rounds, got {options.rounds}")

    torch.set_num_threads(options.threads)
    path = model_path(options.model)
    if options.sweep:
        write("sweep", path, sweep(path, options), options)
        return
    context = max(options.prefill, DECODE_PROMPT + options.decode, options.window) + 1
    decoders = {}
    for combination in options.combinations:
        act, _, kv_dtype = combination.partition(":")
        decoders[act, kv_dtype] = qk.QuantDecoder.from_pretrained(
            path, act=act, kv_dtype=kv_dtype, max_seq_len=context
        )
    kind = "decoder" if options.perplexity is None else "accuracy"
    body = speeds(decoders, path, options) if kind == "decoder" else accuracies(decoders, options)
    write(kind, path, body, options)


def write(kind: str, path: Path, body: dict[str, Any], options: argparse.Namespace) -> None:
    if not options.no_write:
        name = options.name or f"{kind}-{path.stem.lower()}"
        print(record.write(name, kind, options.threads, {"model": path.name, **body}))


if __name__ == "__main__":
    main()
