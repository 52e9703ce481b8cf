"""Damaged directories of safetensors, for `fuzz.py`: headers, indices, configurations."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from checkpoint_writers import (
    Matrix,
    awq_tensors,
    ct_config,
    gptq_tensors,
    group_config,
    packed_tensors,
    round_to_nearest,
)
from fuzz import EDGES, Target, check_decoder, damaged
from safetensors.torch import load, save

from qkernels.checkpoints import CheckpointError
from qkernels.checkpoints.safetensors_directory import DTYPES, INDEX, SINGLE, SafetensorsDirectory
from qkernels.models import family_of_hf

ODD = [
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 2**64, 10**400, 1e308, math.inf, math.nan),
    *("", "text", "F32", "\ud800", "x" * 5000, [], [0], [1, 2], ["a"], [[1]], {}, {"a": {"b": 1}}),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    out = []
    for key, item in inside:
        out.append((*at, key))
        if isinstance(item, (dict, list)):
            out += places(item, (*at, key))
    return out


def damaged_json(value: dict[str, Any], rng: random.Random, textual: float = 0.2) -> bytes:
    """One to three values replaced by odd ones, removed, or given under another key; and, that
    often, damage to the text."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (found := places(value)):
            break
        *path, last = rng.choice(found)
        inside: Any = value
        for key in path:
            inside = inside[key]
        kind = rng.random()
        if kind < 0.6:
            odd = copy.deepcopy(rng.choice(ODD)) if rng.random() < 0.5 else rng.choice(EDGES)
            if isinstance(inside[last], int) and rng.random() < 0.3:
                odd = inside[last] + rng.choice((-1, 1, 8, -64))
            inside[last] = odd
        elif kind < 0.8:
            del inside[last]
        elif isinstance(inside, dict):
            names = ("", "x", "__metadata__", f"{last}2", "\0", "quantization_config")
            inside[rng.choice(names)] = copy.deepcopy(rng.choice((inside[last], rng.choice(ODD))))
        else:
            inside.append(copy.deepcopy(inside[last]))
    text = json.dumps(value)
    if rng.random() < textual / 2 and len(value) > 1:  # one key twice, which JSON allows
        key = rng.choice(list(value))
        text = f"{{{json.dumps(key)}: {json.dumps(rng.choice(list(value.values())))}, {text[1:]}"
    raw = text.encode()
    return damaged(raw, len(raw), rng) if rng.random() < textual else raw


def read_directory(directory: Path, size: int) -> bool:
    """Whether the directory opened; reads every tensor then, in the three ways."""
    with ExitStack() as stack:
        try:
            source = SafetensorsDirectory(directory, stack)
        except CheckpointError as error:
            assert str(directory) in str(error)
            assert len(str(error)) < 4000
            return False
        total = 0
        for name, shape in source.shapes.items():
            whole = source.whole(name)
            assert (tuple(whole.shape), whole.dtype) == (shape, source.dtypes[name])
            total += whole.nbytes
            raw = whole.contiguous().view(-1).view(torch.uint8) if whole.numel() else whole
            raw.sum()  # every byte can be read
            if shape:
                half = shape[0] // 2
                assert source.rows(name, half, shape[0]).shape == (shape[0] - half, *shape[1:])
            if len(shape) == 2:
                assert source.columns(name, 0, shape[1]).shape == shape
        assert total <= size
    return True


class Safetensors(Target):
    """The length and the header of one file with every dtype and several kinds of shapes."""

    def whole(self) -> None:
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype in DTYPES.items():
            shape = [[2, 3], [4], [], [1, 2, 2], [0, 5]][len(self.header) % 5]
            size = math.prod(shape) * dtype.itemsize
            self.header[f"t.{name}"] = {
                "dtype": name,
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
        self.data = random.Random(1).randbytes(end)
        self.path = self.folder / SINGLE
        self.write(json.dumps(self.header).encode(), self.data)

    def write(self, header: bytes, data: bytes, length: int | None = None) -> int:
        length = len(header) if length is None else length
        self.size = self.path.write_bytes(struct.pack("<Q", length) + header + data)
        return self.size

    def damage(self, rng: random.Random) -> int:
        kind = rng.random()
        if kind < 0.5:
            return self.write(damaged_json(self.header, rng), self.data)
        header = json.dumps(self.header).encode()
        if kind < 0.9:
            raw = struct.pack("<Q", len(header)) + header + self.data
            self.size = self.path.write_bytes(damaged(raw, 8 + len(header), rng))
            return self.size
        length = rng.choice(EDGES + [len(header) + change for change in (-2, -1, 1, 2, 1000)])
        data = self.data[: rng.randrange(len(self.data))] if rng.random() < 0.5 else self.data
        return self.write(header, data, length)

    def read(self) -> bool:
        return read_directory(self.folder, self.size)


class Index(Target):
    """The index of two shards; now and then a shard, too."""

    def whole(self) -> None:
        self.shards = {
            f"{part}.safetensors": save({f"{part}.{i}": torch.ones(2, 3) for i in range(3)})
            for part in "ab"
        }
        where = {f"{name[0]}.{i}": name for name in self.shards for i in range(3)}
        self.index = {"metadata": {"total_size": 144}, "weight_map": where}
        self.write(json.dumps(self.index).encode(), self.shards)

    def write(self, index: bytes, shards: dict[str, bytes]) -> int:
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
        for name, raw in shards.items():
            (self.folder / name).write_bytes(raw)
        (self.folder / INDEX).write_bytes(index)
        self.size = len(index) + sum(map(len, shards.values()))
        return self.size

    def damage(self, rng: random.Random) -> int:
        shards, index = dict(self.shards), json.dumps(self.index).encode()
        kind = rng.random()
        if kind < 0.5:
            changed = copy.deepcopy(self.index)
            name = rng.choice(list(changed["weight_map"]))
            other = ("../a.safetensors", "/etc/passwd", ".", "", "b.safetensors", "c.safetensors")
            changed["weight_map"][name] = rng.choice((*other, "a.safetensors\0", "a/../b"))
            index = json.dumps(changed).encode()
        elif kind < 0.9:
            index = damaged_json(self.index, rng)
        else:
            name = rng.choice(list(shards))
            if rng.random() < 0.5:
                del shards[name]
            else:
                shards[name] = shards["a.safetensors" if name[0] == "b" else "b.safetensors"]
        return self.write(index, shards)

    def read(self) -> bool:
        return read_directory(self.folder, self.size)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **SIZES,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {
        **SIZES,
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    },
    "gemma3_text": {
        **SIZES,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16.0,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "dtype": "bfloat16",
    },
}


def write_model(directory: Path, model_type: str) -> dict[str, Any]:
    """A random model of a family; returns its configuration."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": model_type, **CONFIGS[model_type]}
    family = family_of_hf(model_type)
    generator = torch.Generator().manual_seed(0)
    defs = family.weights(family.from_hf(config))
    tensors = {d.hf: torch.randn(d.shape, generator=generator).bfloat16() for d in defs}
    (directory / SINGLE).write_bytes(save(tensors))
    (directory / "config.json").write_text(json.dumps(config))
    return config


class Config(Target):
    """config.json of a model of one of three families."""

    def whole(self) -> None:
        self.models = {name: write_model(self.folder / name, name) for name in CONFIGS}
        self.chosen = "llama"

    def damage(self, rng: random.Random) -> int:
        self.chosen = rng.choice(list(self.models))
        directory = self.folder / self.chosen
        size = (directory / "config.json").write_bytes(damaged_json(self.models[self.chosen], rng))
        return size + (directory / SINGLE).stat().st_size

    def read(self) -> bool:
        return check_decoder(self.folder / self.chosen)


# Formats of quantized checkpoints: the tensors of a matrix, and quantization_config.
QUANTIZED: dict[str, tuple[Callable[[Matrix], dict[str, Any]], dict[str, Any]]] = {
    "gptq": (
        gptq_tensors,
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False},
    ),
    "awq": (
        awq_tensors,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    ),
    "compressed-tensors": (
        functools.partial(packed_tensors, symmetric=False),
        ct_config(
            "pack-quantized",
            group_config(4, strategy="group", group_size=16, symmetric=False),
        ),
    ),
}


class Quantized(Target):
    """Quantized models: config.json, the header, or any byte of the tensors."""

    def whole(self) -> None:
        self.models: dict[str, tuple[dict[str, Any], bytes]] = {}
        for name, (tensors_of, settings) in QUANTIZED.items():
            directory = self.folder / name
            config = {**write_model(directory, "llama"), "quantization_config": settings}
            tensors = load((directory / SINGLE).read_bytes())
            for key in [key for key in tensors if key.endswith("_proj.weight")]:
                order = name == "gptq" and key.endswith("q_proj.weight")
                matrix = round_to_nearest(tensors.pop(key), 4, 16, symmetric=False, act_order=order)
                for part, tensor in tensors_of(matrix).items():
                    tensors[f"{key.removesuffix('weight')}{part}"] = tensor.contiguous()
            self.models[name] = config, save(tensors)
            self.write(name, json.dumps(config).encode(), self.models[name][1])

    def write(self, name: str, config: bytes, weights: bytes) -> int:
        self.chosen = self.folder / name
        size = (self.chosen / "config.json").write_bytes(config)
        return size + (self.chosen / SINGLE).write_bytes(weights)

    def damage(self, rng: random.Random) -> int:
        name = rng.choice(list(self.models))
        config, weights = self.models[name]
        text, header = json.dumps(config).encode(), 8 + struct.unpack("<Q", weights[:8])[0]
        kind = rng.random()
        if kind < 0.4:
            settings = json.loads(damaged_json({"": config["quantization_config"]}, rng, 0.0))
            text = json.dumps({**config, "quantization_config": settings.get("")}).encode()
        elif kind < 0.7:
            changed = damaged_json(json.loads(weights[8:header]), rng)
            weights = struct.pack("<Q", len(changed)) + changed + weights[header:]
        else:
            data = bytearray(weights)
            for _ in range(rng.choice((1, 3, 50))):
                data[rng.randrange(header, len(data))] = rng.choice((0, 0x7C, 0x80, 0xFC, 0xFF))
            weights = bytes(data)
        return self.write(name, text, weights)

    def read(self) -> bool:
        return check_decoder(self.chosen)


class Model(Target):
    """The header of the weights of a model."""

    def whole(self) -> None:
        write_model(self.folder, "llama")
        self.raw = (self.folder / SINGLE).read_bytes()
        self.header = 8 + struct.unpack("<Q", self.raw[:8])[0]

    def damage(self, rng: random.Random) -> int:
        raw = damaged(self.raw, self.header, rng)
        if rng.random() < 0.6:
            text = damaged_json(json.loads(self.raw[8 : self.header]), rng)
            raw = struct.pack("<Q", len(text)) + text + self.raw[self.header :]
        return (self.folder / SINGLE).write_bytes(raw)

    def read(self) -> bool:
        return check_decoder(self.folder)
