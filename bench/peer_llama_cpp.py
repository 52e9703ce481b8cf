"""Decode and prefill side by side with llama.cpp (llama-cpp-python) on the same GGUF file.

    python bench/peer_llama_cpp.py MODEL [--peer-python PYTHON] [--threads 2] [--rounds 7]
        [--requantize Q4_0]

Each engine runs in a process of its own, with the model loaded once; the rounds alternate between
them, and so does who goes first, so that both meet the same machine. PYTHON is the interpreter of
an environment with llama-cpp-python (default: this one). Before anything is timed, the greedy
tokens of both are compared. --requantize has llama.cpp's quantizer write MODEL as another type into
a temporary folder, and races both engines on that.

What is timed. Prefill: a prompt of random ids, new in every round, until the logits of its last
token are there. Decode: after a prompt of 32 tokens, from the first new token to the last, greedy,
argmax included.

GB/s are the checkpoint's bytes that a token reads, times passes over them: a token of decode, 512
of prefill. The read bandwidth is measured between the rows, with both engines idle; its best counts
(bench/footprint.py).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import record
import torch
from footprint import CHUNK, Footprint, footprint, read_ceiling
from workers import Worker, WorkerError

from qkernels.generate import common_prefix

ENGINES = str(Path(__file__).resolve().parent / "engines.py")
OURS, PEER = "qkernels", "llama_cpp"
DECODE_PROMPT = 32
_COMPARED = 32  # greedy tokens


@dataclass(frozen=True)
class Settings:
    """prefill: lengths of prompts; decode: new tokens; pause: seconds before each turn, in which
    the other engine's spinning threads go to sleep. kv_dtype is ours; llama.cpp's is float16."""

    peer_python: str = sys.executable
    threads: int = 2
    rounds: int = 7
    prefill: tuple[int, ...] = (512,)
    decode: int = 64
    context: int = 1024
    act: str = "int8"
    kv_dtype: str = "float16"
    pause: float = 0.3

    def __post_init__(self) -> None:
        if self.rounds < 5:
            raise ValueError(f"a median needs at least 5 rounds, got {self.rounds}")
        if self.decode < 2:
            raise ValueError(f"decode is at least 2 tokens, got {self.decode}")
        needed = max([*self.prefill, DECODE_PROMPT + max(self.decode, _COMPARED)]) + 1
        if self.context < needed:
            raise ValueError(f"the context must be at least {needed} tokens, got {self.context}")


class Asked(Protocol):
    """What `measure` needs of a worker."""

    def ask(self, **request: Any) -> dict[str, Any]: ...


def start(engine: str, path: Path, settings: Settings) -> Worker:
    """A worker with the model loaded. Raises WorkerError, with what the engine said."""
    python = settings.peer_python if engine == PEER else sys.executable
    numbers = ["--threads", str(settings.threads), "--context", str(settings.context)]
    kinds = ["--act", settings.act, "--kv-dtype", settings.kv_dtype]
    return Worker([python, ENGINES, "serve", engine, str(path), *numbers, *kinds])


def require_peer(settings: Settings) -> None:
    """Raises WorkerError where the peer's interpreter has no llama-cpp-python."""
    command = [settings.peer_python, "-c", "import llama_cpp, numpy"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise WorkerError(f"--peer-python {settings.peer_python}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkerError(
            f"--peer-python {settings.peer_python} cannot import llama_cpp ({last}); expected an "
            "environment where  pip install numpy llama-cpp-python  has been run"
        )


def greedy_in_common(workers: Mapping[str, Asked], vocab: int) -> int:
    """Leading tokens of _COMPARED on which the engines agree."""
    rng = random.Random(1)
    ids = [rng.randrange(min(1000, vocab)) for _ in range(DECODE_PROMPT)]
    first, *others = (w.ask(do="decode", ids=ids, count=_COMPARED) for w in workers.values())
    return min(common_prefix(first["tokens"], other["tokens"]) for other in others)


@dataclass(frozen=True)
class Plan:
    """A row: tokens that count, and passes over the weights that they take."""

    what: str
    do: str
    prompt: int
    tokens: int
    passes: int


def plans(settings: Settings) -> list[Plan]:
    rows = [Plan(f"prefill {n}", "prefill", n, n, -(-n // CHUNK)) for n in settings.prefill]
    new = settings.decode - 1  # the first comes out of the prompt's pass
    return [*rows, Plan(f"decode {settings.decode}", "decode", DECODE_PROMPT, new, new)]


def speeds(
    plan: Plan, workers: Mapping[str, Asked], vocab: int, settings: Settings, rng: random.Random
) -> dict[str, list[float]]:
    """Tokens per second of each engine, by round."""
    samples: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(settings.rounds + 1):  # the first warms up
        ids = [rng.randrange(vocab) for _ in range(plan.prompt)]
        order = list(workers) if turn % 2 else list(workers)[::-1]
        for name in order:
            time.sleep(settings.pause)
            answer = workers[name].ask(do=plan.do, ids=ids, count=settings.decode)
            if turn:
                samples[name].append(plan.tokens / answer["seconds"])
    return samples


def rated(plan: Plan, samples: list[float], cost: Footprint, ceiling: float) -> dict[str, Any]:
    """Tokens/s with spread, and the rates that the median means."""
    found = record.summary(samples)
    seconds = plan.tokens / found["median"]
    rate = plan.passes * cost.weight_bytes / seconds / 1e9
    logits = plan.tokens if plan.do == "decode" else 1
    return {
        **found,
        "gb_per_s": round(rate, 3),
        "percent_of_read": round(100 * rate / ceiling, 1),
        "gops": round(cost.ops(plan.tokens, logits) / seconds / 1e9, 1),
    }


def measure(
    workers: Mapping[str, Asked], vocab: int, cost: Footprint, settings: Settings
) -> dict[str, Any]:
    """Rows of tokens per second of each engine, and the read bandwidth of the same run."""
    rng = random.Random(0)
    bandwidths = [record.read_bandwidth(repeats=3)]
    taken = []
    for plan in plans(settings):
        taken.append((plan, speeds(plan, workers, vocab, settings, rng)))
        time.sleep(settings.pause)
        bandwidths.append(record.read_bandwidth(repeats=3))
    ceiling = read_ceiling(bandwidths)
    rows = []
    for plan, samples in taken:
        row: dict[str, Any] = {"what": plan.what}
        for name, values in samples.items():
            row[name] = rated(plan, values, cost, ceiling["read_ceiling_gb_per_s"])
        row["ratio"] = round(row[OURS]["median"] / row[PEER]["median"], 3)
        rows.append(row)
        print(line(row), flush=True)
    return {**ceiling, "rows": rows}


def line(row: dict[str, Any]) -> str:
    def one(name: str) -> str:
        found = row[name]
        if row["what"].startswith("prefill"):
            return f"{name} {found['median']:.1f} tok/s, {found['gops']:.0f} GOPS"
        share = f"{found['gb_per_s']:.1f} GB/s, {found['percent_of_read']:.0f}% of the read"
        return f"{name} {found['median']:.1f} tok/s, {share}"

    return f"{row['what']}: {one(OURS)}; {one(PEER)}; {row['ratio']:.2f}x"


def race(path: Path, settings: Settings) -> dict[str, Any]:
    """Both engines on one file: the body of a result. Raises WorkerError, CheckpointError."""
    torch.set_num_threads(settings.threads)  # of the read bandwidth
    cost = footprint(path)
    with ExitStack() as stack:
        workers = {}
        for name in (OURS, PEER):
            workers[name] = start(name, path, settings)
            stack.callback(workers[name].close)
        vocab = min(worker.hello["vocab"] for worker in workers.values())
        same = greedy_in_common(workers, vocab)
        print(f"greedy tokens agree for {same} of {_COMPARED}")
        found = measure(workers, vocab, cost, settings)
        engines = {name: worker.hello["about"] for name, worker in workers.items()}
    return {
        "model": path.name,
        "bytes": path.stat().st_size,
        "bytes_per_token": cost.weight_bytes,
        "engines": engines,
        "greedy_tokens_in_common": same,
        "of": _COMPARED,
        **found,
    }


def requantized(path: Path, kind: str, folder: Path, settings: Settings) -> Path:
    """A copy of the file as llama.cpp's quantizer writes it. Raises WorkerError."""
    target = folder / f"{path.stem}-requantized-{kind}.gguf"
    command = [settings.peer_python, ENGINES, "quantize"]
    command += [str(path), str(target), kind, "--threads", str(settings.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{path} cannot be written as {kind}:\n{done.stderr[-2000:]}")
    return target


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a race; `settings_of` reads them."""
    usual = Settings()
    parser.add_argument(
        "--peer-python", default=usual.peer_python, help="interpreter with llama-cpp-python"
    )
    parser.add_argument("--threads", type=int, default=usual.threads)
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="at least 5")
    parser.add_argument("--prefill", type=int, nargs="*", default=list(usual.prefill))
    parser.add_argument("--decode", type=int, default=usual.decode)
    parser.add_argument("--context", type=int, default=usual.context)
    parser.add_argument("--act", default=usual.act)
    parser.add_argument(
        "--kv-dtype", default=usual.kv_dtype, help="of qkernels; llama.cpp's default is float16"
    )
    parser.add_argument("--pause", type=float, default=usual.pause, help="seconds between turns")
    parser.add_argument("--no-write", action="store_true")


def settings_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    names = ("peer_python", "threads", "rounds", "decode", "context", "act", "kv_dtype", "pause")
    try:
        return Settings(
            prefill=tuple(options.prefill), **{name: getattr(options, name) for name in names}
        )
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="GGUF file or PACKAGE:FILE")
    parser.add_argument("--requantize", metavar="TYPE", help="race on a copy of this type")
    parser.add_argument("--name", help="name of the result file; default: peer-<model>")
    add_options(parser)
    options = parser.parse_args()
    settings = settings_of(options, parser)

    from qkernels.cli.source import model_path

    path = model_path(options.model)
    try:
        require_peer(settings)
        with tempfile.TemporaryDirectory(prefix="qkernels-peer-") as folder:
            raced = path
            if options.requantize:
                raced = requantized(path, options.requantize, Path(folder), settings)
            body = race(raced, settings)
    except WorkerError as error:
        raise SystemExit(str(error)) from error
    if options.requantize:
        body |= {"requantized_from": path.name, "requantized_to": options.requantize}
    if not options.no_write:
        name = options.name or f"peer-{raced.stem.lower()}"
        print(record.write(name, "peer", settings.threads, body))


if __name__ == "__main__":
    main()
