"""safetensors as `ShardWriter` writes them, against the safetensors package."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.safetensors_directory import (
    DTYPES,
    INDEX,
    SINGLE,
    SafetensorsDirectory,
)
from qkernels.checkpoints.shards import ShardWriter


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    """Odd numbers of elements, so that the order of sizes matters; scalars; nothing at all."""
    found = {}
    for i, dtype in enumerate(dict.fromkeys(DTYPES.values())):
        raw = torch.arange(7 * dtype.itemsize, dtype=torch.uint8) % 2
        found[f"t{i}"] = raw.view(dtype)
        found[f"a.matrix{i}"] = raw.repeat(3).view(dtype).view(3, 7)
    found["scalar"] = torch.tensor(3.5)
    found["none"] = torch.empty(0, 4)
    found["view"] = torch.arange(40).view(5, 8).T[2:4]
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bits(got) == bits(want)


def test_one_file_is_what_the_package_writes(tmp_path: Path) -> None:
    found = tensors_of_all_kinds()
    writer = ShardWriter(tmp_path, 10**9)
    for name, tensor in found.items():
        writer.add(name, tensor)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert writer.nbytes == sum(t.nbytes for t in found.values())
    loaded = load_file(tmp_path / SINGLE)
    assert set(loaded) == set(found)
    for name, tensor in found.items():
        check(loaded[name], tensor)
    theirs = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / SINGLE).stat().st_size


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    found = tensors_of_all_kinds()
    writer = ShardWriter(tmp_path, 200)
    for name, tensor in found.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == writer.nbytes
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([INDEX, *files])
    with ExitStack() as stack:
        source = SafetensorsDirectory(tmp_path, stack)
        for name, tensor in found.items():
            check(source.whole(name).clone(), tensor)
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= 200 or len(held) == 1
