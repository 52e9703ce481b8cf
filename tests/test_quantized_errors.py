"""Quantized checkpoints that are damaged, or ask for what is not supported: one error that names
the tensor or the setting, what was expected, and what came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import (
    awq_tensors,
    ct_config,
    gptq_tensors,
    group_config,
    packed_tensors,
    plain_tensors,
    quantize_linears,
    round_to_nearest,
    write,
)
from torch import Tensor

from qkernels.checkpoints import CheckpointError
from qkernels.nn.decoder import QuantDecoder

pytest.importorskip("transformers", reason="the models are those of transformers")
from test_quantized_checkpoints import bitsandbytes_4bit, bitsandbytes_int8, model_of

Q = "model.layers.1.self_attn.q_proj"  # [64, 64]
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
ORDERED = torch.arange(64, dtype=torch.int32) // 32


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, Any]:
    model = model_of("qwen3")
    matrices = quantize_linears(model, lambda _, w: round_to_nearest(w, 4, 32, symmetric=False))
    assert matrices[Q].codes.shape == (128, 64)
    return model, matrices


def refused(words: str, directory: Path, *args: Any, **changes: Tensor | None) -> None:
    write(directory, *args, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        QuantDecoder.from_pretrained(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("missing: {q}.qweight", {"qweight": None}),
        ("missing: {q}.qzeros", {"qzeros": None}),
        ("missing: {q}.scales", {"scales": None}),
        ("missing: {q}.qweight", {"qweight": None, "qzeros": None, "scales": None, "g_idx": None}),
        (r"unexpected: {q}.weight\b", {"weight": torch.zeros(128, 64)}),
        ("unexpected: {q}.bias", {"bias": torch.ones(128)}),
        (r"{q}.qweight \(expected \[8, 128\], got \[16, 128\]\)", {"qweight": int32(16, 128)}),
        (r"{q}.qzeros \(expected \[2, 16\], got \[2, 8\]\)", {"qzeros": int32(2, 8)}),
        (r"{q}.scales \(expected \[2, 128\], got \[1, 128\]\)", {"scales": torch.ones(1, 128)}),
        (r"{q}.g_idx \(expected \[64\], got \[32\]\)", {"g_idx": int32(32)}),
        ("{q}.qweight must be int32, got int64", {"qweight": int32(8, 128).long()}),
        ("{q}.qzeros must be int32, got float32", {"qzeros": torch.zeros(2, 16)}),
        ("{q}.scales must be float32 or float16 or bf", {"scales": torch.ones(2, 128).double()}),
        ("{q}.g_idx must be int32 or int64, got float32", {"g_idx": torch.zeros(64)}),
        ("{q}.g_idx: g_idx must be from 0 to 1, got 2", {"g_idx": ORDERED + 1}),
        ("{q}.g_idx: g_idx must be from 0 to 1, got -1", {"g_idx": ORDERED - 1}),
        ("{q}.g_idx: g_idx puts 64 columns into group 0", {"g_idx": ORDERED * 0}),
        ("{q}.scales has values that are not", {"scales": torch.full((2, 128), torch.nan)}),
    ],
)
def test_gptq_tensors(
    words: str, changes: dict[str, Any], quantized: tuple[Any, Any], tmp_path: Path
) -> None:
    model, matrices = quantized
    tensors = {path: gptq_tensors(m) for path, m in matrices.items()}
    refused(
        words.format(q=Q.replace(".", r"\.")),
        tmp_path, model, tensors, GPTQ, **{f"{Q}.{part}": t for part, t in changes.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "config"),
    [
        # what the file says against what its tensors are
        (r"qweight \(expected \[16, 128\], got \[8, 128\]\)", {"bits": 8}),
        (r"qweight \(expected \[4, 128\], got \[8, 128\]\)", {"bits": 2}),
        (r"qzeros \(expected \[4, 16\], got \[2, 16\]\)", {"group_size": 16}),
        (r"qzeros \(expected \[1, 16\], got \[2, 16\]\)", {"group_size": -1}),
        # what is not supported, or means nothing
        ("quantization_config: bits must be one of 2, 3, 4, 8, got 5", {"bits": 5}),
        ("quantization_config: bits must be one of 2, 3, 4, 8, got '4'", {"bits": "4"}),
        ("bits must be one of 2, 3, 4, 8, got None", {"bits": None}),
        ("group_size must be -1 or a positive multiple of 16, got 8", {"group_size": 8}),
        ("group_size must be -1 or a positive multiple of 16, got 0", {"group_size": 0}),
        ("group_size must be an integer, got True", {"group_size": True}),
        ("desc_act must be true or false, got 'yes'", {"desc_act": "yes"}),
        (
            "checkpoint_format must be gptq or gptq_v2, got 'marlin'",
            {"checkpoint_format": "marlin"},
        ),
        ("format must be gptq or gptq_v2, got 'bitblas'", {"format": "bitblas"}),
        ("the Marlin layout is not supported", {"is_marlin_format": True}),
        ("pack_dtype must be int32, got 'int8'", {"pack_dtype": "int8"}),
        (r"dynamic '\+:\(' is no regular expression", {"dynamic": {"+:(": {}}}),
        ("dynamic must be a mapping", {"dynamic": [1]}),
        (r"dynamic 'q' must be a mapping of settings, got 3", {"dynamic": {"q": 3}}),
        (r"dynamic 'q': bits must be one of 2, 3, 4, 8, got 7", {"dynamic": {"q": {"bits": 7}}}),
        (
            "quant_method 'hqq' is not supported; supported are gptq, awq, compressed-tensors, b",
            {"quant_method": "hqq"},
        ),
        ("quant_method None is not supported; supported are gptq", {"quant_method": None}),
        ("quant_method 7 is not supported", {"quant_method": 7}),
    ],
)
def test_gptq_settings(
    words: str, config: dict[str, Any], quantized: tuple[Any, Any], tmp_path: Path
) -> None:
    model, matrices = quantized
    tensors = {path: gptq_tensors(m) for path, m in matrices.items()}
    refused(words, tmp_path, model, tensors, {**GPTQ, **config})


def test_desc_act_needs_its_index(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, matrices = quantized
    tensors = {path: gptq_tensors(m, g_idx=False) for path, m in matrices.items()}
    refused(r"missing: .*g_idx", tmp_path, model, tensors, {**GPTQ, "desc_act": True})


def test_a_config_that_is_none(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, matrices = quantized
    tensors = {path: gptq_tensors(m) for path, m in matrices.items()}
    for config in ([], "gptq", 4):
        refused("quantization_config must be a mapping", tmp_path, model, tensors, config)
    write(tmp_path, model, tensors, None)  # without any: the tensors alone say nothing
    with pytest.raises(CheckpointError, match=r"missing: .*\.weight.*unexpected: .*g_idx"):
        QuantDecoder.from_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: cannot be read as JSON"):
        QuantDecoder.from_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"model_file_base_name": "../x"}))
    with pytest.raises(CheckpointError, match=r"model_file_base_name must be the name of a file"):
        QuantDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("bits must be one of 4, got 8", {"bits": 8}),
        ("version must be gemm, got 'gemv'", {"version": "gemv"}),
        ("version must be gemm, got 'marlin'", {"version": "marlin"}),
        ("format must be gemm, got 'gemv_fast'", {"format": "gemv_fast"}),
        ("modules_to_not_convert must be a list", {"modules_to_not_convert": "lm_head"}),
        (r"qzeros \(expected \[1, 16\], got \[2, 16\]\)", {"group_size": 64}),
        (r"64 columns are no multiple of group_size 48", {"group_size": 48}),
    ],
)
def test_awq_settings(
    words: str, config: dict[str, Any], quantized: tuple[Any, Any], tmp_path: Path
) -> None:
    model, matrices = quantized
    tensors = {path: awq_tensors(m) for path, m in matrices.items()}
    if "multiple" in words:  # the shapes of 48 fit, as far as they say
        for parts in tensors.values():
            groups = -(-parts["qweight"].shape[0] // 48)
            for name in ("qzeros", "scales"):
                parts[name] = parts[name][:1].expand(groups, -1).clone()
    refused(words, tmp_path, model, tensors, {**AWQ, **config})


def test_awq_tensors(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, matrices = quantized
    tensors = {path: awq_tensors(m) for path, m in matrices.items()}
    q = Q.replace(".", r"\.")
    refused(f"missing: {q}.qzeros", tmp_path, model, tensors, AWQ, **{f"{Q}.qzeros": None})
    refused(
        rf"{q}.qweight \(expected \[64, 16\], got \[64, 8\]\)",
        tmp_path, model, tensors, AWQ, **{f"{Q}.qweight": int32(64, 8)},
    )  # fmt: skip


CT = ct_config("pack-quantized", group_config(4, group_size=32, symmetric=False))


def changed(**weights: Any) -> dict[str, Any]:
    return ct_config("pack-quantized", group_config(4, **{"group_size": 32, **weights}))


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (
            r"weight_packed \(expected \[128, 16\], got \[128, 8\]\)",
            ct_config("pack-quantized", group_config(8, group_size=32, symmetric=False)),
        ),
        (r"unexpected: .*weight_packed", ct_config("int-quantized", group_config(8))),
        (
            "num_bits must be one of 2, 3, 4, 5, 6, 8, got 7",
            ct_config("pack-quantized", group_config(7, group_size=32)),
        ),
        (
            r"format 'float-quantized' is not supported; supported are pack-quantized, int-q",
            {**CT, "format": "float-quantized"},
        ),
        (
            "format 'nvfp4-pack-quantized' is not supported",
            {**CT, "format": "nvfp4-pack-quantized"},
        ),
        (
            "format 'mxfp4-pack-quantized' is not supported",
            {**CT, "format": "mxfp4-pack-quantized"},
        ),
        ("format 'marlin-24' is not supported", {**CT, "format": "marlin-24"}),
        ("format None is not supported", {**CT, "format": None}),
        ("weights: type must be int, got 'float'", changed(type="float")),
        ("strategy must be tensor or channel or group, got 'block'", changed(strategy="block")),
        ("group_size must be -1 or a positive multiple of 16, got 24", changed(group_size=24)),
        ("actorder must be .*, got 'sideways'", changed(actorder="sideways")),
        ("symmetric must be true or false, got 1", changed(symmetric=1)),
        (
            "sparsity_config = .* is not supported",
            {**CT, "sparsity_config": {"format": "sparse-24-bitmask"}},
        ),
        (
            "transform_config = .* is not supported",
            {**CT, "transform_config": {"config_groups": 1}},
        ),
        ("kv_cache_scheme = .* is not supported", {**CT, "kv_cache_scheme": {"num_bits": 8}}),
        ("config_groups must be a mapping of at least one group", {**CT, "config_groups": {}}),
        ("config_groups.a must be a mapping, got", {**CT, "config_groups": {"a": ["Linear"]}}),
        (
            "targets must be a list of names",
            {**CT, "config_groups": {"a": {**group_config(4, group_size=32), "targets": "Linear"}}},
        ),
        (r"'re:\(' is no regular expression", {**CT, "ignore": ["re:("]}),
        (
            "output_activations are not supported",
            {
                **CT,
                "config_groups": {
                    "a": {**group_config(4, group_size=32), "output_activations": {"num_bits": 8}}
                },
            },
        ),
        (
            "input_activations: dynamic must be true .*, got False",
            {
                **CT,
                "config_groups": {
                    "a": {**group_config(4, group_size=32), "input_activations": {"num_bits": 8}}
                },
            },
        ),
        (
            "input_activations: type must be int, got 'float'",
            {
                **CT,
                "config_groups": {
                    "a": {**group_config(4, group_size=32), "input_activations": {"type": "float"}}
                },
            },
        ),
    ],
)
def test_compressed_tensors_settings(
    words: str, config: dict[str, Any], quantized: tuple[Any, Any], tmp_path: Path
) -> None:
    model, matrices = quantized
    tensors = {path: packed_tensors(m, symmetric=False) for path, m in matrices.items()}
    refused(words, tmp_path, model, tensors, config)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("missing: {q}.weight_packed", {"weight_packed": None}),
        ("missing: {q}.weight_scale", {"weight_scale": None}),
        ("missing: {q}.weight_shape", {"weight_shape": None}),
        ("missing: {q}.weight_zero_point", {"weight_zero_point": None}),
        (
            r"{q}.weight_scale \(expected \[128, 2\], got \[128, 1\]",
            {"weight_scale": torch.ones(128, 1)},
        ),
        ("{q}.weight_packed must be int32, got uint8", {"weight_packed": int32(128, 8).byte()}),
        (
            r"weight_shape must hold \[128, 64\], got \[64, 128\]",
            {"weight_shape": torch.tensor([64, 128])},
        ),
        ("{q}.weight_g_idx: g_idx must be from 0 to 1, got 5", {"weight_g_idx": ORDERED + 4}),
        (
            "{q}.weight_g_idx: g_idx puts 63 columns into group 0",
            {"weight_g_idx": torch.cat([int32(63), int32(1) + 1])},
        ),
        (
            "{q}.weight_zero_point must hold values from -8 to 7, got 9",
            {"weight_zero_point": torch.full((128, 2), 9, dtype=torch.int8)},
        ),
    ],
)
def test_compressed_tensors_tensors(
    words: str, changes: dict[str, Any], quantized: tuple[Any, Any], tmp_path: Path
) -> None:
    model, matrices = quantized
    tensors = {path: packed_tensors(m, symmetric=False) for path, m in matrices.items()}
    refused(
        words.format(q=Q.replace(".", r"\.")),
        tmp_path, model, tensors, CT, **{f"{Q}.{part}": t for part, t in changes.items()},
    )  # fmt: skip


def test_plain_values_beyond_their_bits(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, matrices = quantized
    tensors = {path: plain_tensors(m, symmetric=False) for path, m in matrices.items()}
    config = ct_config("naive-quantized", group_config(4, group_size=32, symmetric=False))
    q = Q.replace(".", r"\.")
    weight = torch.full((128, 64), -9, dtype=torch.int8)
    refused(
        f"{q}.weight must hold values from -8 to 7, got -9",
        tmp_path, model, tensors, config, **{f"{Q}.weight": weight},
    )  # fmt: skip
    symmetric = ct_config("naive-quantized", group_config(4, group_size=32))
    refused("weight_zero_point must be zeros, as its w", tmp_path, model, tensors, symmetric)


def test_bitsandbytes(tmp_path: Path) -> None:
    model = model_of("llama")
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    q = "model.layers.0.self_attn.q_proj"
    linears = {
        path: module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    tensors = {path: bitsandbytes_int8(w)[0] for path, w in linears.items()}
    args = (tmp_path, model, tensors)
    refused(
        "expected one of load_in_8bit and load_in_4bit", *args, {"quant_method": "bitsandbytes"}
    )
    refused(rf"missing: {q}\.SCB", *args, eight, **{f"{q}.SCB": None})
    refused(rf"missing: {q}\.weight.quant_map", *args, four)
    column_major = torch.tensor(2, dtype=torch.uint8)
    refused(
        rf"{q}\.weight_format must be 0 \(rows\), got 2",
        *args, eight, **{f"{q}.weight_format": column_major},
    )  # fmt: skip
    args = (tmp_path, model, {p: bitsandbytes_4bit(w, "nf4", True)[0] for p, w in linears.items()})
    state = f"{q}.weight.quant_state.bitsandbytes__nf4"

    def said(**changes: Any) -> dict[str, Tensor]:
        good = {"blocksize": 64, "shape": [64, 64], "nested_blocksize": 256, "nested_offset": 0.1}
        text = json.dumps({**good, **changes}).encode()
        return {state: torch.tensor(list(text), dtype=torch.uint8)}

    refused(rf"missing: {q}\.weight\.absmax", *args, four, **{f"{q}.weight.absmax": None})
    refused(rf"missing: {state}", *args, four, **{state: None})
    refused("quant_map is all zeros", *args, four, **{f"{q}.weight.quant_map": torch.zeros(16)})
    refused("bitsandbytes__nf4 must hold JSON", *args, four, **{state: torch.ones(9).byte()})
    refused(r"shape must be \[64, 64\], got \[32, 128\]", *args, four, **said(shape=[32, 128]))
    refused("blocksize must be positive, got 0", *args, four, **said(blocksize=0))
    refused("nested_offset must be a number", *args, four, **said(nested_offset=[]))
    refused(r"absmax \(expected \[128\], got \[64\]\)", *args, four, **said(blocksize=32))
    tensors = {p: bitsandbytes_4bit(w, "nf4", True, 128)[0] for p, w in linears.items()}
    refused(
        r"q_proj: blocks of 128 must be a multiple of 16 and divide rows of 64",
        tmp_path, model, tensors, four,
    )  # fmt: skip


def test_a_truncated_file_leaves_nothing(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, matrices = quantized
    write(tmp_path, model, {path: gptq_tensors(m) for path, m in matrices.items()}, GPTQ)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) // 2, len(content) - 1, 7):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
            QuantDecoder.from_pretrained(tmp_path)
