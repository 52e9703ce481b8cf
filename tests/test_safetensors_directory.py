"""Directories of safetensors: what is read from them, and how damaged ones are refused."""

from __future__ import annotations

import json
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qkernels.checkpoints import CheckpointError
from qkernels.checkpoints.safetensors_directory import (
    DTYPES,
    INDEX,
    SINGLE,
    SafetensorsDirectory,
    StateDict,
    read_json,
)


def sharded(directory: Path, shards: dict[str, dict[str, torch.Tensor]], **listed: Any) -> None:
    """Shards, and an index that lists what they hold and `listed`."""
    weight_map: dict[str, Any] = {}
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **listed}}))


def opened(directory: Path) -> SafetensorsDirectory:
    return SafetensorsDirectory(directory, ExitStack())


def test_rows_columns_and_wholes(tmp_path: Path) -> None:
    matrix = torch.arange(24, dtype=torch.int32).view(4, 6)
    sharded(tmp_path, {"a.safetensors": {"m": matrix}, "b.safetensors": {"s": torch.tensor(2.5)}})
    for source in (opened(tmp_path), StateDict({"m": matrix, "s": torch.tensor(2.5)}, "memory")):
        assert source.shapes == {"m": (4, 6), "s": ()}
        assert source.dtypes == {"m": torch.int32, "s": torch.float32}
        assert torch.equal(source.whole("m"), matrix)
        assert torch.equal(source.rows("m", 1, 3), matrix[1:3])
        assert torch.equal(source.columns("m", 2, 5), matrix[:, 2:5])
        assert source.whole("s").item() == 2.5


def raw_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_every_listed_dtype_can_be_read(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        size = dtype.itemsize
        entry = {"dtype": name, "shape": [2, 2], "data_offsets": [0, 4 * size]}
        raw_file(tmp_path / SINGLE, {"t": entry}, bytes(4 * size))
        source = opened(tmp_path)
        assert source.dtypes["t"] == dtype == source.whole("t").dtype
        assert source.rows("t", 0, 1).dtype == source.columns("t", 0, 1).dtype == dtype


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    raw_file(
        tmp_path / SINGLE, {"odd": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"ab"
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor odd has dtype F4"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected weight_map"),
        ('{"weight_map": ["a"]}', "expected weight_map"),
        ('{"weight_map": {"t": 3}}', "expected weight_map"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ("[" * 100000, "nested too deeply"),
        ("\xff", "cannot be read as JSON"),
        (
            '{"weight_map": {"t": "../other.safetensors"}}',
            r"outside the directory: .*\(of tensor t",
        ),
        ('{"weight_map": {"t": "/etc/passwd"}}', r"outside the directory"),
        ('{"weight_map": {"t": "..\\\\other"}}', r"outside the directory"),
        ('{"weight_map": {"t": ".."}}', r"outside the directory"),
        ('{"weight_map": {"t": "nul\\u0000"}}', r"outside the directory"),
        ('{"weight_map": {"t": "gone.safetensors"}}', "gone.safetensors: cannot be read"),
    ],
)
def test_an_index_that_is_none(index: str, words: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index, encoding="latin-1")
    with pytest.raises(CheckpointError, match=words):
        opened(tmp_path)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    def zeros(*names: str) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1) for name in names}

    a, b = "a.safetensors", "b.safetensors"
    sharded(tmp_path, {a: zeros("x")}, y=a)
    with pytest.raises(CheckpointError, match=r"lists y, but a\.safetensors does not have it"):
        opened(tmp_path)
    sharded(tmp_path, {a: zeros("x", "w"), b: zeros("z")}, x=b)
    with pytest.raises(CheckpointError, match=r"lists x in b\.safetensors, but it is in a\.safe"):
        opened(tmp_path)
    sharded(tmp_path, {a: zeros("x", "w"), b: zeros("x", "z")})
    with pytest.raises(CheckpointError, match=r"tensor x is both in .*a\.safe.* and in .*b\.safe"):
        opened(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(64, 64)}, tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    for size in (0, 4, 40, 1000, len(content) - 1):
        (tmp_path / SINGLE).write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safet"):
            opened(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")


def test_dimensions_that_no_tensor_has_are_refused(tmp_path: Path) -> None:
    """A dimension of 0 makes any others fit the file."""
    for shape in ([0, 2**63], [2**62, 0, 4]):
        entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
        raw_file(tmp_path / SINGLE, {"big": entry}, b"")
        with pytest.raises(CheckpointError, match=r"tensor big has shape .*fewer than 2\^63"):
            opened(tmp_path)


def test_half_a_surrogate_pair_is_no_file_name(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t": "\ud800"}}))
    with pytest.raises(CheckpointError, match=r"a shard outside the directory: '.*ud800'"):
        opened(tmp_path)


def test_messages_have_a_bounded_length(tmp_path: Path) -> None:
    name = "x" * 100_000
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    raw_file(tmp_path / SINGLE, {name: entry}, bytes(1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        opened(tmp_path)
    assert len(str(caught.value)) < 5000
