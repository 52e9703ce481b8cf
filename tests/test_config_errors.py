"""Values of config.json and of GGUF metadata that mean nothing: each error names the key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fuzz_safetensors import CONFIGS, write_model
from gguf_writer import Typed, write_llama

from qkernels import QuantDecoder
from qkernels.checkpoints import GGUFFile
from qkernels.loading import load_gguf
from qkernels.models import family_of_hf
from qkernels.models.config import MAX_LAYERS

OTHER_KINDS: dict[type, list[Any]] = {
    int: ["text", [1], {"a": 1}, True, 0.5, math.inf, math.nan, -1, 2**63, 10**400],
    float: ["text", [1.0], {"a": 1}, True, math.inf, math.nan, 10**400],
    bool: ["true", [True], {"a": 1}, 2, math.nan],
    str: ["no such name", ["silu"], {"a": "silu"}, 3, True],
    list: ["text", [["full_attention"]], [{"a": 1}, 2], {"a": "full_attention"}, 7],
    dict: ["text", [1], 3, True],
}


def from_hf(model_type: str, config: dict[str, Any]) -> None:
    family_of_hf(model_type).from_hf({"model_type": model_type, **config})


@pytest.mark.parametrize(
    "model_type,key", [(name, key) for name, config in CONFIGS.items() for key in config]
)
def test_a_value_of_another_kind_is_refused_by_its_key(model_type: str, key: str) -> None:
    config = CONFIGS[model_type]
    from_hf(model_type, config)
    for odd in OTHER_KINDS[type(config[key])]:
        with pytest.raises(ValueError, match=key) as caught:
            from_hf(model_type, {**config, key: odd})
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", list(CONFIGS["llama"]["rope_scaling"]))
def test_parameters_of_the_rotation_are_refused_by_their_key(key: str) -> None:
    rope = CONFIGS["llama"]["rope_scaling"]
    for odd in OTHER_KINDS[str if key == "rope_type" else float]:
        name = "rope.type" if key == "rope_type" else key
        with pytest.raises(ValueError, match=name):
            from_hf("llama", {**CONFIGS["llama"], "rope_scaling": {**rope, key: odd}})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"rope_theta": 1.0}, "theta must be above 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-320}}, "infinite angles"),
        ({"rope_scaling": {"high_freq_factor": 0.5}}, r"high_freq_factor \(0.5\) must be above"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type must be a name"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor must be above 0 and at most 1"),
        ({"head_dim": 2**30}, "rotary dimension must be even and from 2 to 65536"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers must be from 1 to 4096"),
    ],
)
def test_numbers_without_a_meaning_are_refused_before_loading(
    changes: dict[str, Any], message: str
) -> None:
    config = dict(CONFIGS["llama"])
    for key, value in changes.items():
        if isinstance(value, dict) and "high_freq_factor" in value:
            value = {**config["rope_scaling"], **value}
        config[key] = value
    with pytest.raises(ValueError, match=message):
        from_hf("llama", config)


def test_errors_name_the_checkpoint(tmp_path: Path) -> None:
    config = write_model(tmp_path, "qwen2")
    QuantDecoder.from_pretrained(tmp_path)
    for changes, message in (
        ({"layer_types": [{"a": 1}] * 2}, "layer_types must be a list of names"),
        ({"model_type": "x" * 5000}, "model_type 'xx"),
        ({"sliding_window": "8"}, "sliding_window must be a number, got '8'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message) as caught:
            QuantDecoder.from_pretrained(tmp_path)
        assert str(caught.value).startswith(str(tmp_path)) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("block_count", 2**31, "block_count must be from 0 to 2147483647"),
        ("block_count", 2**31 - 1, "block_count must be from 1 to 4096 layers"),
        ("rope.freq_base", 0.5, "theta must be above 1"),
        ("rope.freq_base", math.nan, "freq_base must be finite"),
        ("context_length", Typed(6, math.inf), "context_length must be an integer"),
        ("embedding_length", Typed(5, -64), "embedding_length must be from 0"),
    ],
)
def test_gguf_options_are_refused_by_their_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, message: str
) -> None:
    import gguf_writer

    write = gguf_writer.write_gguf
    monkeypatch.setattr(
        gguf_writer,
        "write_gguf",
        lambda path, metadata, *rest, **options: write(
            path, {**metadata, f"llama.{key}": value}, *rest, **options
        ),
    )
    path = write_llama(tmp_path / "x.gguf")
    assert f"llama.{key}" in GGUFFile(path).metadata
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(str(path))
