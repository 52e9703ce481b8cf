"""Writes the tables of README.md between its BENCH markers from the JSON files in bench/results.

    python bench/report.py            rewrites README.md
    python bench/report.py --check    exits with 1 if README.md is not what the files give
    python bench/report.py --print    prints the tables

Each kind of result has one function here. A table is built from every file of its kind; nothing is
left out because it is slow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:{}:begin -->", "<!-- bench:{}:end -->"

Result = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{result['device']}, {result['threads']} threads, {result['isa']}; {versions}; "
        f"commit {result['commit']}, {result['date']}."
    )


def spread(sample: dict[str, Any]) -> str:
    return f"{sample['median']:.1f} ({sample['min']:.1f} to {sample['max']:.1f})"


def peer(results: list[Result]) -> str:
    """qkernels beside llama.cpp: tokens/s, median (least to most)."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            ratio = row["qkernels"]["median"] / row["llama_cpp"]["median"]
            rows.append(
                [
                    result["model"],
                    row["what"],
                    spread(row["qkernels"]),
                    spread(row["llama_cpp"]),
                    f"{ratio:.2f}x" + ("" if ratio >= 1 else " (slower)"),
                ]
            )
        notes.append(machine(result))
    head = ["model", "what", "qkernels, tok/s", "llama.cpp, tok/s", "qkernels / llama.cpp"]
    return table(head, rows) + "\n\n" + "\n".join(dict.fromkeys(notes))


def decoder(results: list[Result]) -> str:
    """Speed over activation mode and KV type, and the share of the read bandwidth it means."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            rows.append(
                [
                    result["model"],
                    row["act"],
                    row["kv_dtype"],
                    spread(row["prefill"]),
                    spread(row["decode"]),
                    f"{row['gb_per_s']:.1f}",
                    f"{row['percent_of_read']:.0f}%",
                ]
            )
        notes.append(
            f"Read bandwidth in the same run: {result['read_gb_per_s']:.1f} GB/s. {machine(result)}"
        )
    head = [
        "model",
        "act",
        "KV",
        "prefill 512, tok/s",
        "decode, tok/s",
        "decode, GB/s",
        "of the read bandwidth",
    ]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def loading(results: list[Result]) -> str:
    """Peak anonymous memory while loading, over that after imports."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            rows.append(
                [
                    row["model"],
                    f"{row['file_mb']:.1f}",
                    f"{row['packed_mb']:.1f}",
                    f"{row['peak_mb']:.1f}",
                    f"{row['peak_mb'] / row['packed_mb']:.2f}x",
                    f"{row['seconds']:.2f}",
                ]
            )
        notes.append(machine(result))
    head = ["model", "file, MB", "packed, MB", "peak over imports, MB", "peak / packed", "load, s"]
    return table(head, rows) + "\n\n" + "\n".join(dict.fromkeys(notes))


def accuracy(results: list[Result]) -> str:
    """Perplexity by activation mode and KV type."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            change = 100 * (row["perplexity"] / result["reference"] - 1)
            rows.append(
                [
                    result["model"],
                    row["act"],
                    row["kv_dtype"],
                    f"{row['perplexity']:.3f}",
                    f"{change:+.2f}%",
                ]
            )
        notes.append(
            f"{result['text']}; dequantized float32 gives {result['reference']}. {machine(result)}"
        )
    head = ["model", "act", "KV", "perplexity", "against float32"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


KINDS: dict[str, Callable[[list[Result]], str]] = {
    "peer": peer,
    "decoder": decoder,
    "loading": loading,
    "accuracy": accuracy,
}


def load_results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.get("kind") in found:
            found[data["kind"]].append(data)
    return found


def render(results: dict[str, list[Result]]) -> dict[str, str]:
    return {
        kind: KINDS[kind](items) if items else "*Not measured yet.*"
        for kind, items in results.items()
    }


def fill(text: str, sections: dict[str, str]) -> str:
    """`text` with what stands between the markers replaced. A missing marker is an error."""
    for kind, body in sections.items():
        begin, end = BEGIN.format(kind), END.format(kind)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected {begin} and {end} once each")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true", dest="show")
    options = parser.parse_args()
    sections = render(load_results())
    if options.show:
        print("\n\n".join(f"## {kind}\n\n{body}" for kind, body in sections.items()))
        return 0
    readme = ROOT / "README.md"
    now = readme.read_text()
    new = fill(now, sections)
    if options.check:
        if new != now:
            print(
                "README.md differs from bench/results: run python bench/report.py", file=sys.stderr
            )
        return int(new != now)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
