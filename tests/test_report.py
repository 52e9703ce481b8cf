"""bench/report.py: tables from result files, slower rows included; a README that matches them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import report  # noqa: E402  its folder is no package

PLACE = {
    "device": "Some CPU",
    "threads": 2,
    "isa": "avx2",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-01-01",
}


def sample(value: float) -> dict[str, float]:
    return {"median": value, "min": value - 1, "max": value + 1, "n": 5}


def test_the_readme_is_what_the_results_give() -> None:
    """Fails when a result changed, or a number was edited by hand."""
    text = (ROOT / "README.md").read_text()
    assert report.fill(text, report.render(report.load_results())) == text


def test_losses_are_shown(tmp_path: Path) -> None:
    rows = [
        {"what": "prefill 512", "qkernels": sample(300.0), "llama_cpp": sample(200.0)},
        {"what": "decode 64", "qkernels": sample(90.0), "llama_cpp": sample(100.0)},
    ]
    result = {"kind": "peer", **PLACE, "model": "m.gguf", "rows": rows}
    (tmp_path / "peer.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text(json.dumps({"kind": "linear"}))
    sections = report.render(report.load_results(tmp_path))
    assert "| 300.0 (299.0 to 301.0) | 200.0 (199.0 to 201.0) | 1.50x |" in sections["peer"]
    assert "| 0.90x (slower) |" in sections["peer"]
    assert "Some CPU, 2 threads, avx2; torch 2.13.0; commit abc, 2026-01-01." in sections["peer"]
    assert sections["decoder"] == "*Not measured yet.*"


def test_every_kind_makes_a_table() -> None:
    decoder_row = {
        "act": "int8",
        "kv_dtype": "float16",
        "prefill": sample(300.0),
        "decode": sample(100.0),
        "gb_per_s": 9.66,
        "percent_of_read": 60.0,
    }
    sections = report.render(
        {
            "peer": [],
            "decoder": [{**PLACE, "model": "m", "read_gb_per_s": 16.0, "rows": [decoder_row]}],
            "loading": [
                {
                    **PLACE,
                    "rows": [
                        {
                            "model": "m",
                            "file_mb": 90.0,
                            "packed_mb": 91.0,
                            "peak_mb": 100.1,
                            "seconds": 0.5,
                        }
                    ],
                }
            ],
            "accuracy": [
                {
                    **PLACE,
                    "model": "m",
                    "text": "t",
                    "reference": 46.895,
                    "rows": [{"act": "int8", "kv_dtype": "int8", "perplexity": 47.0}],
                }
            ],
        }
    )
    assert "| 9.7 | 60% |" in sections["decoder"]
    assert "| 100.1 | 1.10x | 0.50 |" in sections["loading"]
    assert "| 47.000 | +0.22% |" in sections["accuracy"]


def test_a_missing_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="bench:peer:begin"):
        report.fill("nothing", {"peer": "x"})
