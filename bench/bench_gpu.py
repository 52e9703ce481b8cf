"""The kernels on a GPU, beside a read of the same bytes and beside peers, and the gates they have.

    python bench/bench_gpu.py [--out build/gpu-results] [--seconds 240] [--rounds 7]
        [--only REGEX] [--commit NAME] [--no-decoder]

Every result is checked first. A sample is a chain of at least 64 launches in a CUDA graph over
copies of the inputs that pass the L2 (qkernels/bench/gpu.py); samples of the kernel, of `peak_read`
over as many bytes and of each peer are taken in turns; figures are medians. Peers are torch's own
(cuBLAS, its int4 product, SDPA) and what can be imported of bench/gpu_peers.py; one that is not
there, or fails, is named with the reason. Cases that gates ask about come first: after --seconds no
further case begins. gpu.json and gpu.csv are written again after each case, so that a run that is
cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_peers
import record
import torch

from qkernels._format import columns
from qkernels.bench import gpu
from qkernels.bench.cases import Q4_K, AttentionCase, Case, LinearCase, NormCase
from qkernels.bench.gpu import BFLOAT16, READ, GateCase, Place, Reads
from qkernels.bench.suite import OURS
from qkernels.quant.spec import QuantSpec

W4, W8, W8_ROW = QuantSpec(4, 128), QuantSpec(8, 128), QuantSpec(8, -1)
MODEL = "Llama-3.1-8B"
Row = dict[str, Any]
# Marlin on an H200 at M = 1, W4 with groups of 128: [N, K] -> microseconds, as its users published.
MARLIN_US = {(8192, 8192): 20.3, (8192, 16384): 38.1, (7168, 20480): 40.6, (8192, 81920): 138.4}
LARGE = ((8192, 8192), (28672, 8192), (8192, 28672))  # 34 and 117 MB at 4 bits
PREFILL = ((4096, 4096), (14336, 4096), (8192, 8192))


def linear(n: int, k: int, m: int, spec: QuantSpec = W4, act: str = "float") -> LinearCase:
    return LinearCase("any", m, 0, "linear", n, k, spec, act)


def cases() -> list[Case]:
    """In the order of their importance, each once."""
    found: list[Case] = []
    found += [linear(n, k, m) for m in (1, 4, 8, 16, 64) for n, k in LARGE]
    found += [linear(n, k, m, W8) for m in (1, 4, 8) for n, k in LARGE[:2]]
    found += [linear(4096, 4096, m) for m in (1, 4, 8)]
    found += [linear(n, k, 1) for n, k in MARLIN_US]
    found += [linear(n, k, 2048) for n, k in PREFILL]
    found += [linear(n, k, 2048, W8_ROW, "int8") for n, k in PREFILL]
    for context in (16384, 65536):
        found += [AttentionCase(MODEL, 1, 0, context, kv) for kv in ("bfloat16", "int8", "int4")]
    found += [NormCase(MODEL, m, 0, k, False, False) for m, k in ((4096, 4096), (8192, 8192))]
    found += [linear(n, k, m) for m in (2, 32, 128, 512) for n, k in LARGE[:1]]
    found += [linear(n, k, 1, Q4_K) for n, k in LARGE[:2]]
    found += [linear(n, k, m, W4, "int8") for m in (1, 16, 2048) for n, k in LARGE[:1]]
    found += [AttentionCase(MODEL, m, 0, 4096, "bfloat16") for m in (1, 4096)]
    found += [GateCase(MODEL, 4096, 0, 14336)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Gate:
    """A figure that rows are to reach. figure: of a row; least: what it is to be; of: which rows
    count."""

    name: str
    least: float
    unit: str
    of: Callable[[Row], bool]
    figure: Callable[[Row, Mapping[str, Row]], float | None]


def _percent(row: Row, rows: Mapping[str, Row]) -> float | None:
    return row.get("percent_of_read")


def _ratio(name: str) -> Callable[[Row, Mapping[str, Row]], float | None]:
    def figure(row: Row, rows: Mapping[str, Row]) -> float | None:
        found = row["baselines"].get(name)
        return None if found is None else found["ratio"]

    return figure


def _marlin(row: Row, rows: Mapping[str, Row]) -> float | None:
    return round(MARLIN_US[row["n"], row["k"]] / row["us"]["median"], 2)


def _own_bfloat16(row: Row, rows: Mapping[str, Row]) -> float | None:
    other = rows.get(row["name"].replace(f"KV {row['kv_dtype']}", "KV bfloat16"))
    return None if other is None else round(other["us"]["median"] / row["us"]["median"], 3)


def _weights(row: Row, bits: Iterable[int], m: Iterable[int], low: float, high: float) -> bool:
    """Linear layers of float activations, with weights of so many MB."""
    if row["kernel"] != "linear" or row["act"] != "float" or row["zero"] != "symmetric":
        return False
    return row["bits"] in bits and row["m"] in m and low <= row["bytes"] / 1e6 < high


def _attention(row: Row, *kinds: str) -> bool:
    long = row["kernel"] == "attention_decode" and row["context"] >= 16384
    return long and row["kv_dtype"] in kinds


def _prefill(row: Row, act: str, bits: int) -> bool:
    shape = row["kernel"] == "linear" and row["m"] >= 2048 and row["act"] == act
    return shape and row["bits"] == bits


_INF = float("inf")
GATES = (
    Gate("W4/W8, 30 MB and more, M 1 to 4", 90, "% of read",
         lambda r: _weights(r, (4, 8), (1, 2, 3, 4), 30, _INF), _percent),
    Gate("W4/W8, 30 MB and more, M 8", 85, "% of read",
         lambda r: _weights(r, (4, 8), (8,), 30, _INF), _percent),
    Gate("W4/W8, 8 MB", 70, "% of read",
         lambda r: _weights(r, (4, 8), range(1, 9), 8, 10), _percent),
    Gate("W4 M 1, Marlin's published times", 1, "x Marlin",
         lambda r: _weights(r, (4,), (1,), 0, _INF) and (r["n"], r["k"]) in MARLIN_US, _marlin),
    Gate("W4 M 16, 34 MB", 2.8, "x cuBLAS",
         lambda r: _weights(r, (4,), (16,), 30, 100), _ratio(BFLOAT16)),
    Gate("W4 M 16, 100 MB and more", 3.3, "x cuBLAS",
         lambda r: _weights(r, (4,), (16,), 100, _INF), _ratio(BFLOAT16)),
    Gate("W4 M 64", 2.2, "x cuBLAS",
         lambda r: _weights(r, (4,), (64,), 30, _INF), _ratio(BFLOAT16)),
    Gate("W4A16 M 2048 and more", 0.9, "x cuBLAS",
         lambda r: _prefill(r, "float", 4), _ratio(BFLOAT16)),
    Gate("W8A8 M 2048 and more", 1.5, "x cuBLAS",
         lambda r: _prefill(r, "int8", 8), _ratio(BFLOAT16)),
    Gate("decode attention, 16K and more, bfloat16", 80, "% of read",
         lambda r: _attention(r, "bfloat16"), _percent),
    Gate("decode attention, 16K and more, int8", 1.6, "x bfloat16",
         lambda r: _attention(r, "int8"), _own_bfloat16),
    Gate("decode attention, 16K and more, int4", 2.5, "x bfloat16",
         lambda r: _attention(r, "int4"), _own_bfloat16),
    Gate("RMSNorm, 4096 rows and more", 85, "% of read",
         lambda r: r["kernel"] == "rms_norm" and r["m"] >= 4096, _percent),
    Gate("decode of Llama-3.1-8B's shapes, W4, batch 1", 75, "% of read",
         lambda r: r["kernel"] == "decoder" and r["m"] == 1, _percent),
)  # fmt: skip


def sample(chains: Mapping[str, gpu.Chain], rounds: int) -> dict[str, list[float]]:
    """Microseconds per launch of each, a sample per round; every other round goes backwards."""
    samples: dict[str, list[float]] = {name: [] for name in chains}
    order = list(chains)
    for _ in range(rounds):
        for name in order:
            samples[name].append(chains[name].sample())
        order.reverse()
    return samples


def measure(
    case: Case, place: Place, reads: Reads, rounds: int, peers: Mapping[str, gpu.Peer]
) -> Row:
    """A row of results. Raises CheckError where the kernel is wrong; a peer that is wrong, or
    fails, is left out with the reason."""
    problem = gpu.build(case, place, peers)
    problem.check()
    chains: dict[str, gpu.Chain] = {
        OURS: place.chain(problem.ours, gpu.launches(place, _copies(problem))),
        READ: reads.of(problem.nbytes),
    }
    left_out = dict(problem.left_out)
    for name, baseline in problem.baselines.items():
        try:
            baseline.check(f"{case.name}: {name}", baseline.call(0))
            chains[name] = place.chain(baseline.call, place.launches)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
    samples = sample(chains, rounds)
    ours, read = record.summary(samples.pop(OURS)), record.summary(samples.pop(READ))
    us = ours["median"]
    return {
        **case.fields(),
        "us": ours,
        "read_us": read,
        "bytes": round(problem.nbytes),
        "gb_per_s": round(problem.nbytes / us / 1e3, 1),
        "read_gb_per_s": round(problem.nbytes / read["median"] / 1e3, 1),
        "tflops": round(problem.ops / us / 1e6, 2),
        "percent_of_read": round(100 * read["median"] / us, 1),
        "rotated_bytes": problem.rotated,
        "baselines": {
            name: {"us": record.summary(values), "ratio": round(median(values) / us, 3)}
            for name, values in samples.items()
        },
        "left_out": left_out,
    }


def _copies(problem: Any) -> int:
    return max(1, round(problem.rotated / problem.nbytes))


def decoder_row(place: Place, new_tokens: int = 200, layers: int = 32) -> Row:
    """Tokens per second of a decoder in the shapes of Llama-3.1-8B with random weights, end to end,
    and the share of the time that reading its weights takes."""
    import random_decoder

    decoder = random_decoder.make(place, W4, layers)
    decoder.warmup([1])
    speeds = []
    for _ in range(3):
        out = decoder.generate([[1] * 64], max_new_tokens=new_tokens, stop_at_eos=False)
        speeds.append(out.timings.decode_tokens_per_second)
    us = record.summary([1e6 / speed for speed in speeds])
    chain = Reads(place).of(decoder.weight_bytes / 4)  # as large as a chain can rotate over
    read = record.summary([4 * chain.sample() for _ in range(5)])
    nbytes = decoder.weight_bytes
    return {
        "name": f"decoder {MODEL} W4 g128, {layers} layers, 64 + {new_tokens} tokens M=1",
        "kernel": "decoder", "model": MODEL, "m": 1, "us": us, "read_us": read, "bytes": nbytes,
        "gb_per_s": round(nbytes / us["median"] / 1e3, 1),
        "read_gb_per_s": round(nbytes / read["median"] / 1e3, 1),
        "tokens_per_s": round(1e6 / us["median"], 1),
        "percent_of_read": round(100 * read["median"] / us["median"], 1),
        "baselines": {}, "left_out": {},
    }  # fmt: skip


@dataclass
class Results:
    """Rows and what went wrong, in files that are whole after every row."""

    folder: Path
    place: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        said = {
            "kind": "gpu", **self.place, "gates": gates(self.rows), "failed": self.failed,
            "not_run": self.not_run, "rows": self.rows,
        }  # fmt: skip
        _replace(self.folder / "gpu.json", json.dumps(said, indent=1) + "\n")
        if self.rows:
            self._write_csv()

    def _write_csv(self) -> None:
        flat = []
        for row in self.rows:
            line = {name: value for name, value in row.items() if not isinstance(value, dict)}
            line |= {f"us_{name}": value for name, value in row["us"].items()}
            line["read_us"] = row["read_us"]["median"]
            for name, found in row["baselines"].items():
                line[f"{name}_us"], line[f"{name}_ratio"] = found["us"]["median"], found["ratio"]
            flat.append({**line, **_flat(self.place)})
        names = list(dict.fromkeys(name for line in flat for name in line))
        path = self.folder / "gpu.csv"
        with path.with_suffix(".part").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names, restval="")
            writer.writeheader()
            writer.writerows(flat)
        path.with_suffix(".part").replace(path)


def _flat(place: Mapping[str, Any]) -> dict[str, Any]:
    versions = "; ".join(f"{name} {number}" for name, number in place["versions"].items())
    return {**place, "versions": versions}


def _replace(path: Path, text: str) -> None:
    half = path.with_suffix(".part")
    half.write_text(text)
    half.replace(path)


def gates(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each gate with the figures of its rows; `met` is None where nothing was measured."""
    by_name = {row["name"]: row for row in rows}
    said = []
    for gate in GATES:
        figures = {}
        for row in rows:
            if gate.of(row) and (figure := gate.figure(row, by_name)) is not None:
                figures[row["name"]] = figure
        worst = min(figures.values()) if figures else None
        met = None if worst is None else worst >= gate.least
        said.append({"gate": gate.name, "least": gate.least, "unit": gate.unit, "met": met,
                     "worst": worst, "figures": figures})  # fmt: skip
    return said


def table(results: Results) -> str:
    """A line per row, then one per gate."""
    lines = [["case", "time", "GB/s", "of read", "TFLOP/s", "against"]]
    for row in results.rows:
        ratios = ", ".join(f"{b['ratio']:.2f}x {name}" for name, b in row["baselines"].items())
        lines.append([
            row["name"], f"{row['us']['median']:.1f} us", f"{row['gb_per_s']:.0f}",
            f"{row['percent_of_read']:.0f}%", f"{row.get('tflops', 0):.1f}", ratios or "-",
        ])  # fmt: skip
    verdicts = {None: "not measured", True: "met", False: "MISSED"}
    said = [["gate", "least", "worst", "", "figures"]]
    for gate in gates(results.rows):
        worst = "-" if gate["worst"] is None else f"{gate['worst']:g}"
        figures = " ".join(f"{value:g}" for value in gate["figures"].values())
        least = f"{gate['least']:g} {gate['unit']}"
        said.append([gate["gate"], least, worst, verdicts[gate["met"]], figures])
    trouble = [f"FAILED {name}: {why}" for name, why in results.failed.items()]
    if results.not_run:
        trouble.append(f"no time was left for {len(results.not_run)} cases")
    return "\n".join([columns(lines), "", *trouble, columns(said)])


def provenance(commit: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    said = record.provenance(torch.get_num_threads())
    said["host"] = said.pop("device")
    properties: dict[str, Any] = {"device": "none"}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        properties = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }
    return {**properties, **said, "commit": commit or said["commit"]}


def run(
    chosen: Sequence[Case],
    place: Place,
    results: Results,
    *,
    seconds: float,
    rounds: int,
    peers: Mapping[str, gpu.Peer],
    decoder: Callable[[Place], Row] | None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measures until the time is over, writing after each case. What fails is noted."""
    begin, reads = clock(), Reads(place)
    jobs: list[tuple[str, Callable[[], Row]]] = [
        (case.name, lambda case=case: measure(case, place, reads, rounds, peers))  # type: ignore[misc]
        for case in chosen
    ]
    if decoder is not None:
        # Behind the first cases, so that it is reached; it takes the longest of all.
        jobs.insert(min(3, len(jobs)), ("decoder", lambda: decoder(place)))
    for at, (name, job) in enumerate(jobs):
        if clock() - begin > seconds:
            results.not_run = [left for left, _ in jobs[at:]]
            break
        try:
            row = job()
        except Exception as error:  # whatever a peer raises, the other cases are to be measured
            results.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name}: FAILED: {results.failed[name]}", flush=True)
        else:
            results.rows.append(row)
            share = f"{row['percent_of_read']:.0f}% of read"
            print(f"{name}: {row['us']['median']:.1f} us, {share}", flush=True)
        results.write()
        if place.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except (
                RuntimeError
            ) as error:  # an illegal access: nothing runs in this process any more
                results.failed[f"CUDA, after {name}"] = str(error)[:300]
                results.not_run = [left for left, _ in jobs[at + 1 :]]
                break
    results.write()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-results"))
    parser.add_argument("--seconds", type=float, default=240.0, help="no case begins after them")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--only", metavar="REGEX", help="cases whose names have this in them")
    parser.add_argument("--commit", help="where git is not there to ask")
    parser.add_argument("--no-decoder", action="store_true", help="without the 8B decoder")
    parser.add_argument("--list", action="store_true", help="the cases and gates, and no more")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error(f"a median needs at least 5 rounds, got {options.rounds}")
    try:
        pattern = re.compile(options.only or "")
    except re.error as error:
        parser.error(f"--only: {options.only!r} is not a regular expression: {error}")
    chosen = [case for case in cases() if pattern.search(case.name)]
    wants_decoder = not options.no_decoder and bool(pattern.search("decoder"))
    if options.list:
        print("\n".join([case.name for case in chosen] + [f"gate: {g.name}" for g in GATES]))
        return 0
    from qkernels import devices

    if reason := devices.cuda_problem():
        print(f"bench_gpu: {reason}", file=sys.stderr)
        return 2
    peers, absent = gpu_peers.find()
    results = Results(options.out, {**provenance(options.commit), "absent_peers": absent})
    with torch.inference_mode():
        run(
            chosen, gpu.cuda_place(), results, seconds=options.seconds, rounds=options.rounds,
            peers=peers, decoder=decoder_row if wants_decoder else None,
        )  # fmt: skip
    print(f"\n{table(results)}")
    print(f"{options.out / 'gpu.json'}, {options.out / 'gpu.csv'}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
