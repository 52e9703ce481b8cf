"""Damaged directories of transformers models end in an error that names them, or load; nothing
else, and never at a cost beyond the files' size."""

from __future__ import annotations

from pathlib import Path

from fuzz import run_fuzz


def test_ten_thousand_damaged_headers(tmp_path: Path) -> None:
    """Whatever still opens is read: whole, by rows and by columns."""
    assert 300 < run_fuzz("safetensors", 10_000, tmp_path) < 9_000


def test_damaged_indices(tmp_path: Path) -> None:
    assert 50 < run_fuzz("index", 1_000, tmp_path) < 900


def test_damaged_configurations(tmp_path: Path) -> None:
    assert 50 < run_fuzz("config", 800, tmp_path) < 700


def test_damaged_headers_of_a_model(tmp_path: Path) -> None:
    assert 5 < run_fuzz("model", 800, tmp_path) < 750
