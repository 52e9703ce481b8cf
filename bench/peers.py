"""The 4-bit linear kernel beside those of other projects on the same matrices, and llama.cpp on the
same model.

    python bench/peers.py [--peer-python PYTHON ...] [--model MODEL] [--threads 2] [--rounds 7]

PYTHON: interpreters of environments that may have onnxruntime with onnx, llama-cpp-python or vllm
(default: this one); the first that has a peer runs it. What is nowhere is said and left out.

onnxruntime: MatMulNBits, 4 bits in blocks of 32, activations in int8 (accuracy_level 4), with the
very codes and scales of our weight; its products are compared with the float ones before it is
timed. llama.cpp: --model, as bench/peer_llama_cpp.py measures it. Samples are taken in turns, and
weights rotate past the last-level cache on both sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import peer_llama_cpp as llama
import record
import torch
from footprint import read_ceiling
from workers import Worker, WorkerError

from qkernels.bench import linear
from qkernels.bench.cases import LinearCase
from qkernels.bench.inputs import Rotation, activations, random_weight
from qkernels.bench.suite import default_rotation
from qkernels.bench.timing import Timer
from qkernels.quant.spec import QuantSpec

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 16, 512)
W4 = QuantSpec(4, 32)
NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "llama_cpp": ("llama_cpp",),
    "vllm": ("vllm",),
}
# Bits per weight as each side reads them: 4-bit codes, and per block of 32 a scale, float16 in ours
# and float32 in that of MatMulNBits, as the activations are.
BITS = {"qkernels": W4.bits_per_weight, "onnxruntime": 4 + 32 / 32}
_SAMPLE = 0.03  # seconds
# Both sides quantize activations to int8, which costs about 1% of a product's size.
_TOLERANCE = 0.05
_FIND = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
    except Exception as error:
        found[name] = None
print("\\n" + json.dumps(found))
"""


class WrongProduct(RuntimeError):
    """A peer's result is not that of the same matrix."""


def importable(python: str) -> dict[str, str | None]:
    """Versions of the modules that peers need, None where importing one fails."""
    modules = [name for needs in NEEDS.values() for name in needs]
    done = subprocess.run([python, "-c", _FIND, *modules], capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{python} does not run:\n{done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def find(pythons: list[str]) -> dict[str, tuple[str, str]]:
    """Peers that are there: (interpreter, version)."""
    found: dict[str, tuple[str, str]] = {}
    for python in pythons:
        versions = importable(python)
        for peer, needs in NEEDS.items():
            version = versions[needs[0]]
            if peer not in found and version and all(versions[name] for name in needs):
                found[peer] = (python, version)
    return found


def presence(found: dict[str, tuple[str, str]], model: str | None) -> dict[str, str]:
    """A line for each peer: what was measured, or why not."""
    lines = {}
    for peer, needs in NEEDS.items():
        if peer not in found:
            lines[peer] = f"absent: no interpreter given imports {' and '.join(needs)}"
        elif peer == "vllm":
            lines[peer] = f"{found[peer][1]}, left out: it has no 4-bit product to call by itself"
        elif peer == "llama_cpp" and model is None:
            lines[peer] = f"{found[peer][1]}, left out: it needs --model"
        else:
            lines[peer] = found[peer][1]
    return lines


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Samples of each, taken in turns; every other round goes backwards."""
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            samples[which].append((ours, theirs)[which]())
    return samples


def save_inputs(folder: Path, n: int, k: int, rows: tuple[int, ...]) -> torch.Tensor:
    """Writes what the worker reads; returns the weight [n, k] in float32."""
    plain = random_weight(W4, n, k).unpack()
    np.save(folder / "codes.npy", plain.codes.numpy())
    np.save(folder / "scales.npy", plain.scale.float().numpy())
    for m in rows:
        np.save(folder / f"x{m}.npy", activations(m, k).numpy())
    return plain.dequantize()


def require_same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = ((got - want).norm() / want.norm()).item()
    if got.shape != want.shape or not error < _TOLERANCE:
        raise WrongProduct(f"{name}: off by {error:.3f} of its size, expected below {_TOLERANCE}")


def row_of(case: LinearCase, ops: float, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Times, and rates by the bytes of each side's own weight."""
    row: dict[str, Any] = {**case.fields(), "ops": round(ops)}
    for name, samples in (("qkernels", ours), ("onnxruntime", theirs)):
        found = record.summary(samples)
        seconds = found["median"] / 1e6
        nbytes = round(case.n * case.k * BITS[name] / 8)
        rates = {"gb_per_s": nbytes / seconds / 1e9, "gops": ops / seconds / 1e9}
        rounded = {what: round(rate, 2) for what, rate in rates.items()}
        row[name] = {**found, "bytes": nbytes, **rounded}
    row["ratio"] = round(row["onnxruntime"]["median"] / row["qkernels"]["median"], 3)
    return row


def matmul_nbits(
    python: str,
    options: argparse.Namespace,
    rotation: Rotation,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
) -> dict[str, Any]:
    """Rows beside onnxruntime. Raises WorkerError, WrongProduct, CheckError."""
    script = str(Path(__file__).resolve().parent / "matmul_nbits.py")
    found, bandwidths = [], []
    for n, k in shapes:
        with tempfile.TemporaryDirectory(prefix="qkernels-peers-") as name:
            folder = Path(name)
            weight = save_inputs(folder, n, k, rows)
            copies = rotation.copies(round(n * k * BITS["onnxruntime"] / 8))
            command = [python, script, name, "--copies", str(copies)]
            with closing(Worker([*command, "--threads", str(options.threads)])) as worker:
                for m in rows:
                    x = folder / f"x{m}.npy"
                    worker.ask(x=str(x), to=str(folder / "y.npy"))
                    case = LinearCase("any", m, 0, "linear", n, k, W4, "int8")
                    got = torch.from_numpy(np.load(folder / "y.npy"))
                    require_same(case.name, got, activations(m, k) @ weight.T)
                    problem = linear.build(case, rotation)
                    problem.baselines.clear()
                    problem.check()
                    bandwidths.append(record.read_bandwidth(repeats=3))
                    ours = Timer(problem.ours, _SAMPLE)
                    samples = interleaved(
                        ours.sample,
                        lambda x=x: worker.ask(x=str(x), seconds=_SAMPLE)["us"],
                        options.rounds,
                    )
                    row = row_of(case, problem.ops, *samples)
                    print(line(row), flush=True)
                    found.append(row)
    ceiling = read_ceiling(bandwidths)
    for row in found:
        for side in ("qkernels", "onnxruntime"):
            share = row[side]["gb_per_s"] / ceiling["read_ceiling_gb_per_s"]
            row[side]["percent_of_read"] = round(100 * share, 1)
    return {**ceiling, "rows": found}


def line(row: dict[str, Any]) -> str:
    sides = (f"{side} {row[side]['median']:.0f} us" for side in ("qkernels", "onnxruntime"))
    return f"[{row['n']}, {row['k']}] M={row['m']}: {', '.join(sides)}; {row['ratio']:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer-python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--model", help="GGUF file or PACKAGE:FILE, for llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--name", default="peers", help="of the result file")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error(f"a median needs at least 5 rounds, got {options.rounds}")
    torch.set_num_threads(options.threads)
    try:
        found = find(options.peer_python)
        said = presence(found, options.model)
        for peer, text in said.items():
            print(f"{peer}: {text}", flush=True)
        body: dict[str, Any] = {"peers": said, "rows": []}
        if "onnxruntime" in found:
            with torch.inference_mode():
                body |= matmul_nbits(found["onnxruntime"][0], options, default_rotation())
        if not options.no_write:
            print(record.write(options.name, "peers", options.threads, body))
        if "llama_cpp" in found and options.model is not None:
            end_to_end(found["llama_cpp"][0], options)
    except (WorkerError, WrongProduct) as error:
        raise SystemExit(str(error)) from error


def end_to_end(python: str, options: argparse.Namespace) -> None:
    """What bench/peer_llama_cpp.py does, with its result file."""
    from qkernels.cli.source import model_path

    path = model_path(options.model)
    settings = llama.Settings(python, threads=options.threads, rounds=options.rounds)
    body = llama.race(path, settings)
    if not options.no_write:
        print(record.write(f"peer-{path.stem.lower()}", "peer", options.threads, body))


if __name__ == "__main__":
    main()
