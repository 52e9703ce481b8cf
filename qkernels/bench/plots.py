"""Plots of results, with matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]
_COLOURS = {"int8": "tab:blue", "float32": "tab:orange"}
_MARKERS = {
    "linear": "o",
    "attention_decode": "^",
    "attention_prefill": "v",
    "rms_norm": "s",
    "layer_norm": "D",
}


class PlotsUnavailable(ImportError):
    """matplotlib is not installed."""


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing to files. Raises PlotsUnavailable, which says what to type."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsUnavailable(
            "plots need matplotlib. Type  pip install 'qkernels[bench]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def roofline(result: Result, path: Path) -> None:
    """Speed of every row against operations per byte, under the ceilings of the same run."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(9, 6))
    rows, top = result["rows"], result["ceilings"]
    read = top["read_gb_per_s"]["median"]
    intensity = [row["ops"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    for kind in sorted({row["peak"] for row in rows}):
        peak = top[f"{kind}_gops"]["median"]
        corner = peak / read
        xs = [low, min(max(corner, low), high), high]
        ys = [min(read * x, peak) for x in xs]
        label = f"{kind}: {peak:.0f} GOPS, read {read:.1f} GB/s"
        axes.plot(xs, ys, color=_COLOURS[kind], linewidth=1.2, label=label)
    for kernel, marker in _MARKERS.items():
        for kind, colour in _COLOURS.items():
            points = [
                (x, row["gops"])
                for x, row in zip(intensity, rows, strict=True)
                if row["kernel"] == kernel and row["peak"] == kind
            ]
            if points:
                axes.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    marker=marker,
                    s=24,
                    alpha=0.7,
                    color=colour,
                    label=f"{kernel}, {kind}",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("GOPS")
    axes.set_title(_place(result))
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize="small")
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _place(result: Result) -> str:
    return f"{result['device']}, {result['threads']} threads, {result['isa']}"


def beside_peers(results: list[Result], path: Path) -> None:
    """Tokens/s of both engines as bars, a panel for prefill and one for decode; whiskers from the
    slowest to the fastest round. results: of the kinds peer and race."""
    plt = require_matplotlib()
    kinds = ("prefill", "decode")
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.5 + 0.7 * len(results)), squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        rows = [
            (result["model"], row)
            for result in results
            for row in result["rows"]
            if row["what"].startswith(kind)
        ]
        for shift, side, colour in (
            (-0.2, "qkernels", "tab:blue"),
            (0.2, "llama_cpp", "tab:gray"),
        ):
            found = [row[side] for _, row in rows]
            values = [sample["median"] for sample in found]
            below = [sample["median"] - sample["min"] for sample in found]
            above = [sample["max"] - sample["median"] for sample in found]
            at = [i + shift for i in range(len(rows))]
            axes.barh(at, values, 0.38, xerr=[below, above], color=colour, label=side)
        for i, (_, row) in enumerate(rows):
            ours, theirs = row["qkernels"]["median"], row["llama_cpp"]["median"]
            axes.text(
                max(row["qkernels"]["max"], row["llama_cpp"]["max"]),
                i,
                f"  {ours / theirs:.2f}x",
                va="center",
            )
        labels = [f"{model.removesuffix('.gguf')}\n{row['what']}" for model, row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize="small")
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("tokens/s")
        axes.set_title(kind)
        axes.legend(fontsize="small")
    figure.suptitle(" / ".join(dict.fromkeys(_place(result) for result in results)))
    _save(plt, figure, path)


def by_context_and_batch(result: Result, path: Path) -> None:
    """Decode tokens/s over the context of one sequence, and over the batch at the shortest one, a
    line per KV type. result: of the kind sweep."""
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2))
    rows = result["rows"]
    shortest = min((row["context"] for row in rows if row["batch"] > 1), default=None)
    panel_rows = (
        ("decode", "context", "tokens of context", [r for r in rows if r["batch"] == 1]),
        ("decode", "batch", "sequences", [r for r in rows if r["context"] == shortest]),
        ("prefill", "context", "tokens of the prompt", [r for r in rows if r["batch"] == 1]),
    )
    for axes, (what, over, label, chosen) in zip(panels, panel_rows, strict=True):
        for kv_dtype in dict.fromkeys(row["kv_dtype"] for row in chosen):
            line = sorted((r for r in chosen if r["kv_dtype"] == kv_dtype), key=lambda r: r[over])
            xs, ys = [r[over] for r in line], [r[what]["median"] for r in line]
            least, most = [r[what]["min"] for r in line], [r[what]["max"] for r in line]
            axes.plot(xs, ys, marker="o", label=f"KV {kv_dtype}")
            axes.fill_between(xs, least, most, alpha=0.2)
        axes.set_xscale("log", base=2)
        ticks = sorted({row[over] for row in chosen})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{what}, tokens/s")
        axes.grid(True, linewidth=0.3)
        if chosen:
            axes.legend(fontsize="small")
    figure.suptitle(f"{result['model']}; {_place(result)}")
    _save(plt, figure, path)


def write_plots(result: Result, folder: Path) -> list[Path]:
    """Draws what the result has data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "roofline.png"
    roofline(result, path)
    return [path]
