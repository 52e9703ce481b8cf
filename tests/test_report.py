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


def kernel_row(name: str, bound: str, **ratios: float) -> dict[str, object]:
    return {
        "name": name,
        "us": sample(50.0),
        "gb_per_s": 12.34,
        "gops": 456.7,
        "bound": bound,
        "percent_of_ceiling": 61.5,
        "baselines": {k: {"us": sample(50 * v), "ratio": v} for k, v in ratios.items()},
    }


def test_kernels_keep_every_row_and_mark_the_slower_ones() -> None:
    top = {"read_gb_per_s": sample(20.0), "int8_gops": sample(600.0), "float32_gops": sample(200.0)}
    rows = [
        kernel_row("linear a", "memory", torch_bfloat16=4.0, torch_int4pack=0.5),
        kernel_row("linear b", "compute", torch_int_mm=1.0),
        kernel_row("alone", "memory"),
    ]
    text = report.kernels([{**PLACE, "ceilings": top, "rows": rows}])
    time = "50.0 (49.0 to 51.0)"
    share = "62% of memory"
    ratios = "4.00x bf16, 0.50x int4pack (slower)"
    assert f"| linear a | {time} | 12.3 GB/s | {share} | {ratios} |" in text
    assert f"| linear b | {time} | 457 GOPS | 62% of compute | 1.00x _int_mm |" in text
    assert f"| alone | {time} | 12.3 GB/s | {share} | - |" in text
    assert "read 20.0 GB/s, int8 600 GOPS, float32 200 GOPS. Some CPU" in text


def test_a_missing_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="bench:peer:begin"):
        report.fill("nothing", {"peer": "x"})


def test_an_unmeasured_section_needs_no_marker() -> None:
    assert report.fill("nothing", {"peer": report.NOT_MEASURED}) == "nothing"


def quality_result(model: str, rows: list[dict[str, object]]) -> dict[str, object]:
    return {
        **PLACE,
        "model": model,
        "input": "some text",
        "source": "float32",
        "note": "",
        "rows": rows,
    }


def test_quality_puts_models_side_by_side() -> None:
    bits = {"linear_bits": 4.5, "bits": 10.25}
    against = {"ratio": 1.025, "ratio_error": 0.003, "kl_mean": 0.0421, "top1": 0.91234}
    whole = {"ratio": 1.0, "ratio_error": 0.0, "kl_mean": 0.0, "top1": 1.0}
    encoder = quality_result(
        "E",
        [
            {"name": "float", "cosine_mean": 1.0, "cosine_worst": 1.0, **bits},
            {"name": "W4 g32", "cosine_mean": 0.96875, "cosine_worst": 0.95, **bits},
        ],
    )
    decoder = quality_result(
        "D",
        [
            {"name": "float", "perplexity": 20.0, **whole, **bits},
            {"name": "W4 g32", "perplexity": 20.5, **against, **bits},
            {"name": "KV int8", "perplexity": 20.1, **against},
        ],
    )
    lines = report.quality([encoder, decoder]).splitlines()
    assert lines[0] == "| linear layers | E: cosine, mean | worst | D: perplexity | KL | top-1 |"
    assert lines[2] == "| float | 1.00000 | 1.00000 | 20.000 | 0 | 100.0% |"
    ppl = "20.500 (+2.50 ± 0.30%)"
    assert lines[3] == f"| W4 g32 | 0.96875 | 0.95000 | {ppl} | 0.042 | 91.2% |"
    assert lines[4].startswith("| KV int8 | - | - | 20.100")
    assert "| W4 g32 | 4.50 / 10.25 | 4.50 / 10.25 |" in lines
    assert not any(line.startswith("| KV int8 | - | - |") and "20" not in line for line in lines)


def test_transformers_says_where_it_loses() -> None:
    row = {"name": "W4A16", "mb": 120.0, "linear_mb": 60.0}
    row |= {"decode": sample(50.0), "decode_ratio": 1.75, "prefill": sample(9.0)}
    row |= {"prefill_ratio": 0.9}
    result = {**PLACE, "model": "D", "decode": 64, "prefill": 512, "rows": [row]}
    text = report.transformers([result])
    assert "| D | W4A16 | 120.0 | 60.0 | decode 64 | 50.0 (49.0 to 51.0) | 1.75x |" in text
    assert "| prefill 512 | 9.0 (8.0 to 10.0) | 0.90x (slower) |" in text


def rated(value: float, gb: float, percent: float, gops: float) -> dict[str, float]:
    return {**sample(value), "gb_per_s": gb, "percent_of_read": percent, "gops": gops}


READ = {"read_gb_per_s": 50.0, "read_ceiling_gb_per_s": 45.0}


def race_result() -> dict[str, object]:
    rows = [
        {
            "what": "prefill 512",
            "qkernels": rated(300.0, 1.0, 2.0, 600.0),
            "llama_cpp": rated(100.0, 0.5, 1.0, 200.0),
        },
        {
            "what": "decode 64",
            "qkernels": rated(90.0, 27.0, 60.0, 9.0),
            "llama_cpp": rated(100.0, 30.0, 66.7, 10.0),
        },
    ]
    return {"kind": "race", **PLACE, **READ, "model": "random.gguf", "rows": rows}


def test_a_race_shows_what_its_speeds_mean() -> None:
    text = report.render({"race": [race_result()]})["race"]
    assert "| 3.00x | 600 GOPS | 200 GOPS |" in text
    assert "| 0.90x (slower) | 27.0 GB/s, 60% | 30.0 GB/s, 67% |" in text
    assert "in the same run: 50.0 GB/s, of which 45.0 count. Some CPU" in text


def sweep_row(kv_dtype: str, batch: int, context: int) -> dict[str, object]:
    return {
        "kv_dtype": kv_dtype,
        "batch": batch,
        "context": context,
        "first_token": {"median": 0.25, "min": 0.2, "max": 0.3, "n": 5},
        "prefill": sample(500.0),
        "decode": sample(100.0 * batch),
        "gb_per_s": 20.0,
        "percent_of_read": 50.0,
    }


def sweep_result() -> dict[str, object]:
    sizes = [(1, 128), (1, 4096), (2, 128)]
    rows = [sweep_row(kv, *size) for kv in ("int8", "float16") for size in sizes]
    load = {"median": 0.5, "min": 0.4, "max": 0.6, "n": 6}
    return {"kind": "sweep", **PLACE, **READ, "model": "m.gguf", "load_seconds": load, "rows": rows}


def test_a_sweep_has_every_wait_of_a_user() -> None:
    text = report.sweep([sweep_result()])
    assert "| context | first token of any sequence, ms | prefill, tok/s |" in text
    assert "| m.gguf | int8 | 2 | 128 | 250 | 500.0 (499.0 to 501.0) |" in text
    assert "| 200.0 (199.0 to 201.0) | 20.0 (50%) |" in text
    assert "m.gguf loads in 0.50 s (0.40 to 0.60)." in text


def test_kernel_peers_say_who_was_absent() -> None:
    row = {
        "n": 4096,
        "k": 4096,
        "weight": "W4 g32",
        "m": 1,
        "qkernels": rated(300.0, 30.0, 75.0, 100.0),
        "onnxruntime": rated(240.0, 37.0, 90.0, 120.0),
        "ratio": 0.8,
    }
    peers = {"onnxruntime": "1.32.0", "vllm": "absent: no interpreter given imports vllm"}
    result = {**PLACE, **READ, "peers": peers, "rows": [row, {**row, "m": 16, "ratio": 2.0}]}
    text = report.peers([result])
    assert "| 0.80x (slower) | 30.0 GB/s, 75% |" in text
    assert "| 2.00x | 100 GOPS |" in text
    assert "Peers: onnxruntime 1.32.0, vllm absent: no interpreter" in text


def test_instruction_sets_are_held_against_the_best() -> None:
    best = {"isa": "avx512", "prefill": sample(900.0), "decode": sample(200.0)}
    rows = [
        {**best, "prefill_ratio": 1.0, "decode_ratio": 1.0},
        {**best, "isa": "avx2", "prefill_ratio": 0.5, "decode_ratio": 0.9},
    ]
    result = {**PLACE, "model": "m.gguf", "prefill": 512, "rows": rows}
    lines = report.isa([result]).splitlines()
    assert "avx512" in lines[2] and "100%" in lines[2]
    assert "avx2" in lines[3] and "50%" in lines[3] and "90%" in lines[3]


def test_a_busy_core_shows_what_is_kept() -> None:
    row = {"idle": sample(200.0), "busy": sample(90.0), "kept": 0.45}
    text = report.busy([{**PLACE, "model": "m.gguf", "decode": 64, "rows": [row]}])
    assert "| m.gguf | 200.0 (199.0 to 201.0) | 90.0 (89.0 to 91.0) | 45% |" in text


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    results = {"kernels": [], "peer": [], "race": [race_result()], "sweep": [sweep_result()]}
    drawn = report.draw(results, tmp_path / "plots")
    assert [path.name for path in drawn] == ["sweep-m.png", "peers.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    nothing = {kind: [] for kind in report.KINDS}
    assert report.draw(nothing, tmp_path / "plots") == []
