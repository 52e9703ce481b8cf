"""What `qkernels plan` says beside what a model takes and does.

    python bench/check_plan.py MODEL [MODEL ...] [--context 1024] [--rounds 7] [--threads 2]

MODEL: GGUF file, directory or PACKAGE:FILE. Each is loaded in a process of its own, which notes its
resident memory after its imports, the peak while it loads, and the memory once a context is full.
Then come rounds: the read bandwidth, a plan that rehearses the model, a decode from a short prompt,
one from a prompt that nearly fills the context, a prefill. Ratios are medians of these pairs.
Beside them stands what the formula alone gives, for machines that are not this one. Results:
bench/results/plan-<model>.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import record  # noqa: E402

TOLERANCE = 0.2
DECODE = 64
_GREEDY = {"temperature": 0, "stop_at_eos": False}


def status(name: str) -> int:
    """Bytes that /proc/self/status tells."""
    from qkernels.machines import _kilobytes

    return _kilobytes(Path("/proc/self/status"), name)


def child(path: str, context: int, rounds: int, threads: int, options: dict[str, str]) -> None:
    import torch

    import qkernels as qk
    from qkernels.bench.ceilings import array_bytes, peak
    from qkernels.machines import GB, Machine, available, read_rate
    from qkernels.plan import plan

    torch.set_num_threads(threads)
    process = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    decoder = qk.QuantDecoder.from_pretrained(path, max_seq_len=context, **options)
    loading = status("VmHWM")
    loaded = status("VmRSS")
    decoder.encode("the tokenizer is made now")
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(decoder.config.vocab) for _ in range(length)]

    long, short = context - DECODE - 1, 8
    decoder.generate([prompt(long)], max_new_tokens=DECODE, **_GREEDY)  # warms up, and fills
    running = status("VmHWM")
    array = torch.ones(array_bytes() // 8, dtype=torch.int64)
    names = "decode", "decode_full", "prefill"
    samples: dict[str, list[float]] = {name: [] for name in ("read", "int8", "float32", *names)}
    ratios: dict[str, dict[str, list[float]]] = {
        how: {name: [] for name in names} for how in ("rehearsed", "computed")
    }
    planned: dict[str, list[float]] = {name: [] for name in names}
    length = min(512, long)
    for _ in range(rounds):
        samples["read"].append(read_rate(0.1, array))
        for kind in ("int8", "float32"):
            samples[kind].append(GB * max(peak(kind) for _ in range(3)))
        machine = Machine(
            record.cpu_name(), "cpu", available(), process, samples["read"][-1],
            samples["int8"][-1], samples["float32"][-1], "this run", here=True,
        )  # fmt: skip
        plans = {
            how: plan(path, m, context=context, prompt=length, **options)
            for how, m in (("rehearsed", machine), ("computed", replace(machine, here=False)))
        }
        assert plans["rehearsed"].speed.rehearsed
        for name, tokens in (("decode", short), ("decode_full", long)):
            made = decoder.generate([prompt(tokens)], max_new_tokens=DECODE, **_GREEDY)
            samples[name].append(made.timings.decode_tokens_per_second)
        made = decoder.generate([prompt(length)], max_new_tokens=1, **_GREEDY)
        samples["prefill"].append(made.timings.prefill_tokens_per_second)
        for name in names:
            planned[name].append(getattr(plans["rehearsed"].speed, name))
            for how, said in plans.items():
                ratios[how][name].append(getattr(said.speed, name) / samples[name][-1])
    rates = {
        name: {
            "planned": median(planned[name]),
            "measured": median(samples[name]),
            "ratio": median(ratios["rehearsed"][name]),
            "ratios": [round(r, 3) for r in ratios["rehearsed"][name]],
            "ratio_computed": median(ratios["computed"][name]),
        }
        for name in names
    }
    memory = plans["rehearsed"].memory
    found = {
        "model": Path(path).name,
        "context": context,
        "machine": asdict(machine),
        "options": options,
        "memory": {
            "process": process,
            "weights": {"planned": memory.weights, "measured": decoder.nbytes},
            "loaded": {
                "planned": process + memory.weights + memory.heap,
                "measured": loaded,
            },
            "while_loading": {"planned": memory.while_loading, "measured": loading},
            "running": {"planned": memory.running, "measured": running},
            # What the plan adds to a process, beside what the model added
            "running_growth": {
                "planned": memory.running - process,
                "measured": running - process,
            },
            "parts": asdict(memory),
        },
        "speed": rates,
        "samples": {name: record.summary(values) for name, values in samples.items()},
    }
    print(json.dumps(found), flush=True)


def off(pair: dict[str, Any]) -> float:
    """How far the plan is from what was measured: 0.1 is 10%."""
    return float(pair.get("ratio", pair["planned"] / pair["measured"])) - 1


def report(found: dict[str, Any]) -> bool:
    """Prints a model's lines; whether all that is promised is within the tolerance."""
    ok = True
    promised = {
        "memory": ("weights", "loaded", "while_loading", "running", "running_growth"),
        "speed": ("decode", "decode_full", "prefill"),
    }
    for what, names in promised.items():
        unit = 1e6 if what == "memory" else 1
        for name in names:
            pair = found[what][name]
            good = abs(off(pair)) <= TOLERANCE
            ok &= good
            print(
                f"{found['model']:38} {name:15} planned {pair['planned'] / unit:9.1f}  measured "
                f"{pair['measured'] / unit:9.1f} {'MB' if what == 'memory' else 'tok/s':6}"
                f"{off(pair):+6.1%}{'' if good else '  beyond 20%'}"
                + (f"  (computed {pair['ratio_computed'] - 1:+.1%})" if what == "speed" else "")
            )
    return ok


# Recorded runs: file, layers, and the bytes of keys and values that a step of the row reads.
RECORDED = {
    "decoder-smollm2-135m-instruct.q4_1": 30,
    "peer-smollm2-135m-instruct.q4_1": 30,
    "peer-gemma-3-270m-q4_k_m": 18,
    "race-llama-3.2-1b-q4_0": 16,
    "race-llama-3.2-1b-q4_k_m": 16,
    "race-llama-3.1-8b-q4_k_m": 32,
}


def recorded() -> None:
    """What the formula for packed weights and int8 activations gives for files in bench/results,
    from the read bandwidth that they have."""
    from qkernels.estimate import LAYER_SECONDS, READ_SHARE

    for name, layers in RECORDED.items():
        found = json.loads((record.RESULTS / f"{name}.json").read_text())
        read = found["read_ceiling_gb_per_s"] * 1e9
        rows = [r for r in found["rows"] if r.get("act", "int8") == "int8"]
        row = next(r for r in rows if "decode" in r or r["what"].startswith("decode"))
        nbytes = row.get("bytes_per_token") or found["bytes_per_token"]
        measured = (row["decode"] if "decode" in row else row["qkernels"])["median"]
        planned = 1 / (nbytes / (READ_SHARE * read) + layers * LAYER_SECONDS)
        print(
            f"{name:40} planned {planned:6.1f}  recorded {measured:6.1f} tok/s "
            f"{planned / measured - 1:+6.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--recorded", action="store_true", help="the formula and older results")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--act", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = {"act": options.act, "kv_dtype": options.kv_dtype}
    if options.child:
        child(options.models[0], options.context, options.rounds, options.threads, kinds)
        return
    if options.recorded:
        recorded()
    elif not options.models:
        parser.error("a MODEL is needed, or --recorded")
    from qkernels.cli.source import model_path

    ok = True
    for model in options.models:
        path = model_path(model)
        words = [sys.executable, __file__, "--child", str(path)]
        for name in ("context", "rounds", "threads", "act", "kv_dtype"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        found = json.loads(subprocess.check_output(words, cwd=ROOT, text=True).splitlines()[-1])
        ok &= report(found)
        if not options.no_write:
            name = f"plan-{path.stem.lower()}"
            print(record.write(name, "plan", options.threads, found))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
