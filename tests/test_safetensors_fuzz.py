"""Damaged directories of transformers models end in an error that names them, or load; nothing
else, and never at a cost beyond the files' size."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_writers import ct_config, group_config
from fuzz import run_fuzz

from qkernels.checkpoints import CheckpointError
from qkernels.checkpoints.compressed_tensors import CompressedTensors


def test_ten_thousand_damaged_headers(tmp_path: Path) -> None:
    """Whatever still opens is read: whole, by rows and by columns."""
    assert 300 < run_fuzz("safetensors", 10_000, tmp_path) < 9_000


def test_damaged_indices(tmp_path: Path) -> None:
    assert 50 < run_fuzz("index", 1_000, tmp_path) < 900


def test_damaged_configurations(tmp_path: Path) -> None:
    assert 50 < run_fuzz("config", 800, tmp_path) < 700


def test_damaged_headers_of_a_model(tmp_path: Path) -> None:
    assert 5 < run_fuzz("model", 800, tmp_path) < 750


def test_damaged_quantized_models(tmp_path: Path) -> None:
    """GPTQ, AWQ and compressed-tensors: settings, headers and the bytes of the tensors."""
    assert 20 < run_fuzz("quantized", 400, tmp_path) < 350


def test_activations_that_are_no_mapping(tmp_path: Path) -> None:
    group = {**group_config(4, strategy="channel"), "input_activations": 1}
    with pytest.raises(
        CheckpointError, match=r"group_0: input_activations must be a mapping, got 1"
    ):
        CompressedTensors(ct_config("pack-quantized", group), "here")
