"""A decoder on every set of kernels that this CPU can run, but the scalar one, against the best.

    python bench/instruction_sets.py MODEL [--threads 2] [--rounds 7]

One process and one model: packed weights are the same for every set. The rounds go over the sets in
turn, backwards every other time. Prompts are random ids, new in every round.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch

import qkernels as qk
from qkernels.cli.source import model_path

_PROMPT, _DECODE = 512, 64


def measure(decoder: Any, isas: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows in the order of `isas`; ratios to the first."""
    found: dict[str, dict[str, list[float]]] = {isa: {"prefill": [], "decode": []} for isa in isas}
    rng = random.Random(0)
    try:
        for turn in range(rounds + 1):  # the first warms up
            for isa in isas if turn % 2 else isas[::-1]:
                torch.ops.qkernels.set_cpu_isa(isa)
                prompt = [rng.randrange(decoder.config.vocab) for _ in range(_PROMPT)]
                timings = decoder.generate(
                    [prompt], max_new_tokens=_DECODE, temperature=0, stop_at_eos=False
                ).timings
                if turn > 0:
                    found[isa]["prefill"].append(timings.prefill_tokens_per_second)
                    found[isa]["decode"].append(timings.decode_tokens_per_second)
    finally:
        torch.ops.qkernels.set_cpu_isa("auto")
    rows = []
    for isa in isas:
        row: dict[str, Any] = {"isa": isa}
        for what, samples in found[isa].items():
            row[what] = record.summary(samples)
            best = record.summary(found[isas[0]][what])["median"]
            row[f"{what}_ratio"] = round(row[what]["median"] / best, 3)
        rows.append(row)
    return rows


def main() -> None:
    parser = record.RoundsParser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.options()
    torch.set_num_threads(options.threads)
    path = model_path(options.model)
    decoder = qk.QuantDecoder.from_pretrained(path, act="int8", max_seq_len=_PROMPT + _DECODE)
    # The scalar set is there to be right, and takes minutes.
    isas = [isa for isa in torch.ops.qkernels.cpu_isas().split(", ") if isa != "scalar"]
    if not isas:
        parser.error("this CPU has only the scalar set")
    rows = measure(decoder, isas, options.rounds)
    for row in rows:
        print(
            f"{row['isa']}: prefill {_PROMPT} {row['prefill']['median']:.1f} tok/s "
            f"({100 * row['prefill_ratio']:.0f}%), decode {_DECODE} "
            f"{row['decode']['median']:.1f} tok/s ({100 * row['decode_ratio']:.0f}%)"
        )
    if not options.no_write:
        body = {"model": path.name, "prefill": _PROMPT, "decode": _DECODE, "rows": rows}
        print(record.write(f"isa-{path.stem.lower()}", "isa", options.threads, body))


if __name__ == "__main__":
    main()
