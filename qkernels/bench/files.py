"""Results as files and as a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .._format import columns

Result = dict[str, Any]
_SHORT = {
    "torch_bfloat16": "bf16",
    "torch_float32": "float32",
    "torch_int4pack": "int4pack",
    "torch_int8pack": "int8pack",
    "torch_int_mm": "_int_mm",
    "torch_sdpa": "SDPA",
    "torch_sdpa_float32": "SDPA float32",
    "torch_rms_norm": "rms_norm",
    "torch_layer_norm": "layer_norm",
}
_CASE = (
    "name", "kernel", "model", "m", "layer", "n", "k", "weight", "bits", "group", "zero", "act",
    "context", "kv_dtype",
)  # fmt: skip
_MEASURED = ("gb_per_s", "gops", "bound", "percent_of_ceiling", "bytes", "ops", "rotated_bytes")
_PLACE = ("device", "cores", "threads", "isa", "load_average", "commit", "date")


def write_json(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_csv(result: Result, path: Path) -> None:
    """One line per row, each with device, versions, commit and the ceilings; empty where a column
    does not apply."""
    place = {name: result[name] for name in _PLACE}
    place["versions"] = "; ".join(f"{k} {v}" for k, v in result["versions"].items())
    place |= {name: sample["median"] for name, sample in result["ceilings"].items()}
    lines = []
    for row in result["rows"]:
        line = {name: row.get(name, "") for name in (*_CASE, *_MEASURED)}
        line |= {f"us_{name}": value for name, value in row["us"].items()}
        for name in _SHORT:
            found = row["baselines"].get(name)
            line[f"{name}_us"] = "" if found is None else found["us"]["median"]
            line[f"{name}_ratio"] = "" if found is None else found["ratio"]
            line[f"{name}_n"] = "" if found is None else found["us"]["n"]
        lines.append({**line, **place})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def time_text(us: float) -> str:
    if us < 1000:
        return f"{us:.1f} us"
    return f"{us / 1000:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def rate_text(row: dict[str, Any]) -> str:
    """GB/s where memory bounds the case, GOPS where arithmetic does."""
    if row["bound"] == "memory":
        return f"{row['gb_per_s']:.1f} GB/s"
    return f"{row['gops']:.0f} GOPS"


def ratio_text(row: dict[str, Any]) -> str:
    """How many times faster than each baseline; below 1 it is slower, and says so, as it does where
    the baseline was called only once."""
    parts = []
    for name, found in row["baselines"].items():
        slower = "" if found["ratio"] >= 1 else " (slower)"
        once = " (1 call)" if found["us"]["n"] == 1 else ""
        parts.append(f"{found['ratio']:.2f}x {_SHORT[name]}{slower}{once}")
    return ", ".join(parts) or "-"


def table(result: Result) -> str:
    """The rows in aligned columns."""
    head = ["case", "time", "least", "most", "rate", "of ceiling", "against torch"]
    lines = [head]
    for row in result["rows"]:
        us = row["us"]
        lines.append(
            [
                row["name"],
                time_text(us["median"]),
                time_text(us["min"]),
                time_text(us["max"]),
                rate_text(row),
                f"{row['percent_of_ceiling']:.0f}%",
                ratio_text(row),
            ]
        )
    return columns(lines)


def machine_text(result: Result) -> str:
    """Ceilings and machine, in two lines."""
    top = result["ceilings"]

    def said(name: str, unit: str) -> str:
        sample = top[name]
        spread = f"{sample['min']:.4g} to {sample['max']:.4g}"
        return f"{sample['median']:.4g} {unit} ({spread})"

    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"ceilings: read {said('read_gb_per_s', 'GB/s')}, int8 {said('int8_gops', 'GOPS')}, "
        f"float32 {said('float32_gops', 'GOPS')}\n"
        f"{result['device']}, {result['threads']} threads, {result['isa']}; {versions}; commit "
        f"{result['commit']}, {result['date']}"
    )
