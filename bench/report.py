"""Writes the tables of README.md between its BENCH markers from the JSON files in bench/results.

    python bench/report.py            rewrites README.md
    python bench/report.py --plots    draws bench/results/plots/*.png
    python bench/report.py --check    exits with 1 if README.md is not what the files give
    python bench/report.py --print    prints the tables

Each kind of result has one function here. A table is built from every file of its kind; nothing is
left out because it is slow.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLOTS = RESULTS / "plots"
sys.path.insert(0, str(ROOT))
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


def rate(row: Result, side: str) -> str:
    """What the speed means: of the read bandwidth for decode, operations for prefill."""
    found = row[side]
    if "gb_per_s" not in found:
        return "-"
    if row["what"].startswith("prefill"):
        return f"{found['gops']:.0f} GOPS"
    return f"{found['gb_per_s']:.1f} GB/s, {found['percent_of_read']:.0f}%"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" + ("" if ratio >= 1 else " (slower)")


def peer(results: list[Result]) -> str:
    """qkernels beside llama.cpp: tokens/s, median (least to most); where the run measured them,
    rates too."""
    rated = any("gb_per_s" in row["qkernels"] for result in results for row in result["rows"])
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            ratio = row["qkernels"]["median"] / row["llama_cpp"]["median"]
            cells = [
                result["model"],
                row["what"],
                spread(row["qkernels"]),
                spread(row["llama_cpp"]),
                times(ratio),
            ]
            rates = [rate(row, "qkernels"), rate(row, "llama_cpp")] if rated else []
            rows.append([*cells, *rates])
        notes.append(read_note(result) + agreement(result) + machine(result))
    head = ["model", "what", "qkernels, tok/s", "llama.cpp, tok/s", "qkernels / llama.cpp"]
    if rated:
        head += ["qkernels: rate, share of read", "llama.cpp"]
    return table(head, rows) + "\n\n" + "\n".join(dict.fromkeys(notes))


def agreement(result: Result) -> str:
    """How many leading greedy tokens both engines chose, for results that say so."""
    if "greedy_tokens_in_common" not in result:
        return ""
    common, of = result["greedy_tokens_in_common"], result["of"]
    return f"{result['model']}: the first {common} of {of} greedy tokens after random ids agree. "


def read_note(result: Result) -> str:
    """The ceiling of the shares, for results that hold it."""
    if "read_gb_per_s" not in result:
        return ""
    best = result["read_gb_per_s"]
    used = result.get("read_ceiling_gb_per_s", best)
    capped = f", of which {used:.1f} count" if used < best else ""
    return f"Read bandwidth in the same run: {best:.1f} GB/s{capped}. "


def sweep(results: list[Result]) -> str:
    """A decoder by KV type, context and batch: everything a user waits for."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            rows.append(
                [
                    result["model"],
                    row["kv_dtype"],
                    str(row["batch"]),
                    str(row["context"]),
                    f"{1000 * row['first_token']['median']:.0f}",
                    spread(row["prefill"]),
                    spread(row["decode"]),
                    f"{row['gb_per_s']:.1f} ({row['percent_of_read']:.0f}%)",
                ]
            )
        load = result["load_seconds"]
        loaded = f"{result['model']} loads in {load['median']:.2f} s ({load['min']:.2f} to "
        loaded += f"{load['max']:.2f}). "
        notes.append(loaded + read_note(result) + machine(result))
    head = ["model", "KV", "batch", "context"]
    head += ["first token of any sequence, ms", "prefill, tok/s"]
    head += ["decode, tok/s", "decode, GB/s (of read)"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def peers(results: list[Result]) -> str:
    """The 4-bit linear kernel beside those of other projects: microseconds."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            ours = row["qkernels"]
            memory = row["m"] == 1
            speed = f"{ours['gb_per_s']:.1f} GB/s, {ours['percent_of_read']:.0f}%"
            rows.append(
                [
                    f"[{row['n']}, {row['k']}] {row['weight']}",
                    str(row["m"]),
                    spread(ours),
                    spread(row["onnxruntime"]),
                    times(row["ratio"]),
                    speed if memory else f"{ours['gops']:.0f} GOPS",
                ]
            )
        said = ", ".join(f"{name} {text}" for name, text in result["peers"].items())
        notes.append(f"Peers: {said}. {read_note(result)}{machine(result)}")
    head = ["matrix", "M", "qkernels, us", "onnxruntime MatMulNBits, us"]
    head += ["onnxruntime / qkernels", "qkernels"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


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
        notes.append(read_note(result) + machine(result))
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


def transformers(results: list[Result]) -> str:
    """Models of transformers before and after `qk.quantize_`."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            for what in ("prefill", "decode", "encode"):
                if what not in row:
                    continue
                ratio = row[f"{what}_ratio"]
                amount = f" {result[what]}" if what in result else f" {result['batch']}"
                rows.append(
                    [
                        result["model"],
                        row["name"],
                        f"{row['mb']:.1f}",
                        f"{row['linear_mb']:.1f}",
                        f"{what}{amount}",
                        spread(row[what]),
                        f"{ratio:.2f}x" + ("" if ratio >= 1 else " (slower)"),
                    ]
                )
        notes.append(machine(result))
    head = ["model", "weights", "model, MB", "linears, MB", "what", "per second", "ratio"]
    text = "Tokens per second, of the encoder sentences; ratio to the first row of each model."
    return table(head, rows) + "\n\n" + text + "\n" + "\n".join(dict.fromkeys(notes))


def _quality_cells(row: Result | None) -> dict[str, str]:
    """The metrics of one row, by their headings."""
    if row is None:
        return {}
    if "cosine_mean" in row:
        return {"cosine, mean": f"{row['cosine_mean']:.5f}", "worst": f"{row['cosine_worst']:.5f}"}
    cells = {}
    if "perplexity" in row:
        change, error = 100 * (row["ratio"] - 1), 100 * row["ratio_error"]
        beside = "" if row["name"] == "float" else f" ({change:+.2f} ± {error:.2f}%)"
        cells["perplexity"] = f"{row['perplexity']:.3f}{beside}"
    kl = "0" if row["kl_mean"] == 0 else f"{row['kl_mean']:.2g}"
    return {**cells, "KL": kl, "top-1": f"{100 * row['top1']:.1f}%"}


def quality(results: list[Result]) -> str:
    """Metrics of every scheme and model against its float self; then bits per weight."""
    # The order of the longest list, which is a decoder's; what only others have comes last.
    names = max(([row["name"] for row in result["rows"]] for result in results), key=len)
    names = list(dict.fromkeys([*names, *(r["name"] for x in results for r in x["rows"])]))
    by_name = [{row["name"]: row for row in result["rows"]} for result in results]
    heads = [
        list(dict.fromkeys(k for row in result["rows"] for k in _quality_cells(row)))
        for result in results
    ]
    head = ["linear layers"]
    for result, columns in zip(results, heads, strict=True):
        head += [f"{result['model']}: {columns[0]}", *columns[1:]]
    rows, bits = [], []
    for name in names:
        cells, sizes = [name], [name]
        for rows_of, columns in zip(by_name, heads, strict=True):
            row = rows_of.get(name)
            found = _quality_cells(row)
            cells += [found.get(column, "-") for column in columns]
            has = row is not None and "linear_bits" in row
            sizes.append(f"{row['linear_bits']:.2f} / {row['bits']:.2f}" if row and has else "-")
        rows.append(cells)
        if any(size != "-" for size in sizes[1:]):
            bits.append(sizes)
    said = [
        f"{result['model']}: {result['input']}; weights from {result['source']}. "
        f"{result['note']}".rstrip()
        for result in results
    ]
    explained = (
        "KL(float || quantized) in nats per token; top-1: both think the same token likeliest; ±: "
        "paired standard error. Rows of weights alone are simulated (the weights are packed and "
        "decoded, and transformers runs them in float32), since packed weights decode to the same "
        "floats; W4A8, W8A8 and KV rows run through the kernels."
    )
    sized = table(["bits per weight: linears / whole model", *(r["model"] for r in results)], bits)
    whole = "Whole model: embeddings, norms and biases counted at 16 bits."
    parts = [table(head, rows), explained, "\n".join(said), sized, whole]
    notes = "\n".join(dict.fromkeys(machine(result) for result in results))
    return "\n\n".join([*parts, notes])


def kernels(results: list[Result]) -> str:
    """Every kernel that was measured: time, rate, share of the ceiling, against torch."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from qkernels.bench import files  # imports torch, which the other tables do without

    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            rate, ratio = files.rate_text(row), files.ratio_text(row)
            percent = f"{row['percent_of_ceiling']:.0f}% of {row['bound']}"
            rows.append([row["name"], spread(row["us"]), rate, percent, ratio])
        top = result["ceilings"]
        notes.append(
            f"Ceilings in the same run: read {top['read_gb_per_s']['median']:.1f} GB/s, int8 "
            f"{top['int8_gops']['median']:.0f} GOPS, float32 {top['float32_gops']['median']:.0f} "
            f"GOPS. {machine(result)}"
        )
    head = ["kernel", "us", "rate", "of the ceiling", "against torch"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def busy(results: list[Result]) -> str:
    """Decode while another process keeps one core busy."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            speeds = [spread(row["idle"]), spread(row["busy"])]
            rows.append([result["model"], *speeds, f"{100 * row['kept']:.0f}%"])
        notes.append(machine(result))
    head = ["model", "decode idle, tok/s", "one core busy, tok/s", "kept"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def isa(results: list[Result]) -> str:
    """The same decoder on every instruction set of a CPU."""
    rows, notes = [], []
    for result in results:
        for row in result["rows"]:
            cells = [result["model"], str(result["prefill"]), row["isa"]]
            for what in ("prefill", "decode"):
                cells += [spread(row[what]), f"{100 * row[f'{what}_ratio']:.0f}%"]
            rows.append(cells)
        notes.append(machine(result))
    head = ["model", "prompt", "instruction set", "prefill, tok/s", "of the best set"]
    head += ["decode, tok/s", "of the best set"]
    return table(head, rows) + "\n\n" + "\n".join(notes)


KINDS: dict[str, Callable[[list[Result]], str]] = {
    "peer": peer,
    "decoder": decoder,
    "loading": loading,
    "accuracy": accuracy,
    "quality": quality,
    "transformers": transformers,
    "kernels": kernels,
    "race": peer,
    "sweep": sweep,
    "peers": peers,
    "busy": busy,
    "isa": isa,
}
NOT_MEASURED = "*Not measured yet.*"


def load_results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.get("kind") in found:
            found[data["kind"]].append(data)
    return found


def render(results: dict[str, list[Result]]) -> dict[str, str]:
    return {kind: KINDS[kind](items) if items else NOT_MEASURED for kind, items in results.items()}


def fill(text: str, sections: dict[str, str]) -> str:
    """`text` with what stands between the markers replaced. A missing marker is an error, but for
    what has not been measured."""
    for kind, body in sections.items():
        begin, end = BEGIN.format(kind), END.format(kind)
        if body == NOT_MEASURED and begin not in text and end not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected {begin} and {end} once each")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def draw(results: dict[str, list[Result]], folder: Path = PLOTS) -> list[Path]:
    """Plots of what has been measured, beside the results. Raises PlotsUnavailable without
    matplotlib."""
    from qkernels.bench import plots

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for result in results["kernels"]:
        name = "roofline-" + re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        drawn.append(folder / f"{name}.png")
        plots.roofline(result, drawn[-1])
    for result in results["sweep"]:
        drawn.append(folder / f"sweep-{Path(result['model']).stem.lower()}.png")
        plots.by_context_and_batch(result, drawn[-1])
    if both := [*results["peer"], *results["race"]]:
        drawn.append(folder / "peers.png")
        plots.beside_peers(both, drawn[-1])
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    parser.add_argument("--print", action="store_true", dest="show")
    options = parser.parse_args()
    results = load_results()
    if options.plots:
        print("\n".join(str(path) for path in draw(results)))
        return 0
    sections = render(results)
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
