"""quantization_config with anything in it: a format, or one CheckpointError; and what it describes
costs no memory that the tensors do not have."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from checkpoint_writers import ct_config, group_config
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import CheckpointError
from qkernels.checkpoints.formats import quantized_format
from qkernels.checkpoints.safetensors_directory import StateDict

GOOD: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "dynamic": {"a": {}}},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ct_config(
        "pack-quantized",
        {
            **group_config(4, strategy="group", group_size=32, actorder=None),
            "input_activations": {"num_bits": 8, "type": "int", "dynamic": True},
        },
    ),
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 8, 16, 64, 2**40, 10**400])
    | st.floats()
    | st.sampled_from(["group", "channel", "int", "gemm", "re:(", "Linear", "int-quantized", ""])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
TENSORS = StateDict(
    {
        "m.qweight": torch.zeros(8, 64, dtype=torch.int32),
        "m.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "m.scales": torch.ones(1, 64),
        "m.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "m.weight_scale": torch.ones(64, 1),
        "m.weight_shape": torch.tensor([64, 64]),
    },
    "tensors",
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a nested one."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inside:
        found.append((*at, key))
        if isinstance(part, (dict, list)):
            found += places(part, (*at, key))
    return found


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_anything_in_a_config(data: st.DataObject) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from(GOOD)))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(config)))
        inside: Any = config
        for key in way:
            inside = inside[key]
        inside[last] = data.draw(VALUES)
        if not isinstance(config, dict) or not places(config):
            break
    try:
        json.dumps(config)
        stored = quantized_format({"quantization_config": config}, "fuzz")
        assert stored is not None
        parts = stored.parts(TENSORS, "m", 64, 64, "Linear")
        fits = parts is not None and all(TENSORS.shapes.get(n) == p.shape for n, p in parts.items())
        if fits:
            spec = stored.open(TENSORS, "m", 64, 64, "Linear").spec
            assert spec.padded_k(64) <= 128
    except CheckpointError as error:
        assert "fuzz" in str(error) or "tensors" in str(error)


@pytest.mark.parametrize("config", GOOD[:3], ids=lambda c: c["quant_method"])
def test_a_group_larger_than_a_row_is_the_row(config: dict[str, Any]) -> None:
    text = json.dumps(config).replace('"group_size": 32', f'"group_size": {2**40}')
    stored = quantized_format({"quantization_config": json.loads(text)}, "fuzz")
    assert stored is not None
    if config["quant_method"] == "awq":  # whose rows are whole groups
        with pytest.raises(CheckpointError, match="64 columns are no multiple of group_size"):
            stored.open(TENSORS, "m", 64, 64, "Linear")
        return
    assert stored.open(TENSORS, "m", 64, 64, "Linear").spec.group_size == -1
