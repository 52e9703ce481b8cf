"""Decode while another process keeps one core busy, against decode on an idle machine.

    python bench/busy_core.py MODEL [--rounds 7] [--decode 64]

Threads of a team wait for each other many times a token, so that a core which is taken away half of
the time could make all of them crawl. The rounds alternate: idle, busy, idle ... The busy process
is pinned to the last core and never sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch

import qkernels as qk
from qkernels.cli.source import model_path

_PROMPT = list(range(100, 132))


def spin(core: int, started: Any) -> None:
    os.sched_setaffinity(0, {core})
    started.set()
    while True:
        pass


def decode(decoder: Any, count: int) -> float:
    """Tokens per second."""
    result = decoder.generate([_PROMPT], max_new_tokens=count, temperature=0, stop_at_eos=False)
    return float(result.timings.decode_tokens_per_second)


def beside_a_busy_core(decoder: Any, count: int, core: int) -> float:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    busy = context.Process(target=spin, args=(core, started), daemon=True)
    busy.start()
    try:
        if not started.wait(timeout=60):
            raise SystemExit("the busy process did not start within 60 s")
        time.sleep(0.2)  # the scheduler has seen it
        return decode(decoder, count)
    finally:
        busy.kill()
        busy.join()


def main() -> None:
    parser = record.RoundsParser(__doc__)
    parser.add_argument("--decode", type=int, default=64)
    options = parser.options()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("one core cannot be both busy and idle")

    torch.set_num_threads(len(cores))  # fewer would let the team avoid the busy core
    path = model_path(options.model)
    decoder = qk.QuantDecoder.from_pretrained(path, act="int8", max_seq_len=256)
    decode(decoder, options.decode)
    idle, busy = [], []
    for _ in range(options.rounds):
        idle.append(decode(decoder, options.decode))
        busy.append(beside_a_busy_core(decoder, options.decode, cores[-1]))
    kept = record.summary(busy)["median"] / record.summary(idle)["median"]
    row = {"idle": record.summary(idle), "busy": record.summary(busy), "kept": round(kept, 3)}
    print(
        f"decode {options.decode}: idle {row['idle']['median']:.1f} tok/s, one core busy "
        f"{row['busy']['median']:.1f} tok/s: {100 * kept:.0f}%"
    )
    if not options.no_write:
        body = {"model": path.name, "decode": options.decode, "rows": [row]}
        print(record.write(f"busy-{path.stem.lower()}", "busy", len(cores), body))


if __name__ == "__main__":
    main()
