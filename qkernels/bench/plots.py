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
    axes.set_title(f"{result['device']}, {result['threads']} threads, {result['isa']}")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_plots(result: Result, folder: Path) -> list[Path]:
    """Draws what the result has data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "roofline.png"
    roofline(result, path)
    return [path]
