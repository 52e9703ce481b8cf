"""Checkpoints of other methods in stock `from_pretrained`: on packed layers, exactly."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
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
    quantize_linears,
    round_to_nearest,
    write,
)
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels import hf
from qkernels.checkpoints import CheckpointError
from qkernels.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers", reason="the host that is taken over")
from transformers.quantizers import auto  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::qkernels.convert.QuantWarning")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IDS = torch.arange(4, 44).reshape(2, 20)


def float_model(**changes: Any) -> Any:
    torch.manual_seed(7)
    config = transformers.Qwen2Config(**{**SIZES, **changes})
    model = transformers.Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def load(directory: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    hf.register()
    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    yield
    after = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    assert before == after


def gptq(bits: int = 4, symmetric: bool = True, order: bool = False, v2: bool = False) -> Any:
    def make(model: Any, directory: Path) -> dict[str, Matrix]:
        how = {"symmetric": symmetric, "act_order": order}
        found = quantize_linears(
            model, lambda path, w: round_to_nearest(w, bits, 32, **how, seed=len(path))
        )
        config = {
            "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order,
            "checkpoint_format": "gptq_v2" if v2 else "gptq",
        }  # fmt: skip
        write(directory, model, {p: gptq_tensors(m, v2) for p, m in found.items()}, config)
        return found

    return make


def awq(model: Any, directory: Path) -> dict[str, Matrix]:
    found = quantize_linears(model, lambda _, w: round_to_nearest(w, 4, 32, symmetric=False))
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    write(directory, model, {p: awq_tensors(m) for p, m in found.items()}, config)
    return found


def packed(bits: int, symmetric: bool = True, order: bool = False) -> Any:
    def make(model: Any, directory: Path) -> dict[str, Matrix]:
        how = {"symmetric": symmetric, "act_order": order}
        found = quantize_linears(model, lambda _, w: round_to_nearest(w, bits, 32, **how))
        group = group_config(
            bits, symmetric=symmetric, strategy="group", group_size=32,
            actorder="group" if order else None,
        )  # fmt: skip
        tensors = {p: packed_tensors(m, symmetric, order) for p, m in found.items()}
        write(directory, model, tensors, ct_config("pack-quantized", group))
        return found

    return make


def plain(model: Any, directory: Path) -> dict[str, Matrix]:
    found = quantize_linears(model, lambda _, w: round_to_nearest(w, 8))
    group = group_config(8, strategy="channel")
    tensors = {p: plain_tensors(m) for p, m in found.items()}
    write(directory, model, tensors, ct_config("int-quantized", group))
    return found


CASES: dict[str, tuple[str, Any]] = {
    "gptq-4": ("gptq", gptq()),
    "gptq-4-asymmetric-v2": ("gptq", gptq(symmetric=False, v2=True)),
    "gptq-4-act-order": ("gptq", gptq(order=True, symmetric=False)),
    "gptq-2": ("gptq", gptq(2, symmetric=False)),
    "gptq-3-act-order": ("gptq", gptq(3, order=True)),
    "gptq-8": ("gptq", gptq(8)),
    "awq": ("awq", awq),
    "packed-4": ("compressed-tensors", packed(4)),
    "packed-4-asymmetric": ("compressed-tensors", packed(4, symmetric=False)),
    "packed-3-act-order": ("compressed-tensors", packed(3, order=True)),
    "plain-8": ("compressed-tensors", plain),
}
TIED = ("gptq-4", "awq", "packed-4-asymmetric")  # the others have a head of their own


@pytest.mark.parametrize("case", CASES)
def test_exactly(case: str, tmp_path: Path) -> None:
    """The packed weights are bitwise those of the file, and the logits are the dequantized
    model's: two orders of summing products of float32 in a model of two layers. Saved and loaded
    again, both are bitwise the same."""
    method, make = CASES[case]
    model = float_model(tie_word_embeddings=case in TIED)
    matrices = make(model, tmp_path / "given")
    with hf.taken_over(method):
        taken = load(tmp_path / "given", dtype=torch.float32)
    layers = {p: m for p, m in taken.named_modules() if isinstance(m, QuantLinear)}
    assert set(layers) == set(matrices) and all(m.act == "float" for m in layers.values())
    for path, matrix in matrices.items():
        assert torch.equal(layers[path].packed.dequantize(), matrix.dense), path
    want, got = logits(model), logits(taken)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    taken.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), got)
    for (name, tensor), (other, same) in zip(
        sorted(taken.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert name == other and tensor.dtype == same.dtype and torch.equal(tensor, same)


def test_dequantized_where_it_stands_the_logits_are_bitwise(tmp_path: Path) -> None:
    model = float_model()
    gptq(order=True)(model, tmp_path)
    with hf.taken_over("gptq"):
        taken = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(taken.dequantize()), logits(model))
    assert not hasattr(taken.config, "quantization_config")


def test_activations_in_int8_when_asked(tmp_path: Path) -> None:
    awq(float_model(), tmp_path)
    with hf.taken_over("awq", act="int8"):
        taken = load(tmp_path, dtype=torch.float32)
    assert {m.act for m in taken.modules() if isinstance(m, QuantLinear)} == {"int8"}


def test_activations_in_int8_when_the_checkpoint_says_so(tmp_path: Path) -> None:
    model = float_model()
    qk.quantize_(model, "W8A8", group_size=-1)
    qk.save_pretrained(model, tmp_path)
    with hf.taken_over("compressed-tensors"):
        taken = load(tmp_path, dtype=torch.float32)
    assert {m.act for m in taken.modules() if isinstance(m, QuantLinear)} == {"int8"}
    assert torch.equal(logits(taken), logits(model))


def test_biases_of_zeros_that_the_model_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ gave every layer one. Others would be lost."""
    model = float_model()
    gptq()(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    for value, error in ((0.0, None), (1.0, f"no linear layer .*{name}")):
        save_file({**tensors, name: torch.full((128,), value)}, tmp_path / "model.safetensors")
        with hf.taken_over("gptq"):
            if error is None:
                _, info = load(tmp_path, dtype=torch.float32, output_loading_info=True)
                assert not info["unexpected_keys"] and not info["missing_keys"]
            else:
                with pytest.raises(CheckpointError, match=error):
                    load(tmp_path, dtype=torch.float32)


def test_a_base_model_and_a_checkpoint_of_one(tmp_path: Path) -> None:
    """Names with and without the prefix of the base model."""
    model = float_model()
    matrices = gptq()(model, tmp_path)
    with hf.taken_over("gptq"):
        base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
        weight = base.layers[1].mlp.up_proj.packed.dequantize()
        assert torch.equal(weight, matrices["model.layers.1.mlp.up_proj"].dense)
        tensors = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
        whole = load(tmp_path, dtype=torch.float32)
    want = logits(model)
    torch.testing.assert_close(logits(whole), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


DAMAGE: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "missing: .*up_proj.scales"),
    "misshapen": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.scales": torch.ones(3, 128)}),
        r"up_proj.scales \(expected \[2, 128\], got \[3, 128\]\)",
    ),
    "not finite": (
        lambda t: t["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")),
        "up_proj.scales has values that are not finite",
    ),
    "of no layer": (
        lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": torch.zeros(1, 1).int()}),
        "no linear layer or table of a known kind for model.layers.7.mlp.up_proj.qweight",
    ),
    "a type": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.g_idx": torch.zeros(64)}),
        "up_proj.g_idx must be int32 or int64, got float32",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_error(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    gptq(order=True)(float_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with hf.taken_over("gptq"), pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_setting_that_is_not_supported(tmp_path: Path) -> None:
    gptq()(float_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        hf.taken_over("gptq"),
        pytest.raises(CheckpointError, match=r"bits must be one of .* got 7"),
    ):
        load(tmp_path)


def test_twice_and_back() -> None:
    known = "known are gptq, awq, compressed-tensors, gguf"
    with pytest.raises(ValueError, match=f"unknown method 'hqq'; {known}"):
        hf.take_over("gptq", "hqq")
    with pytest.raises(ValueError, match="name one or more of gptq"):
        hf.take_over()
    with pytest.raises(ValueError, match="act must be auto, int8 or float, got 'int4'"):
        hf.take_over("gptq", act="int4")
    with pytest.raises(ValueError, match="'gptq' is not taken over"):
        hf.give_back("gptq")
    hf.take_over("gptq", "awq")
    try:
        for methods in (("gptq",), ("gguf", "awq"), ("gguf", "gguf")):
            with pytest.raises(ValueError, match=f"'{methods[-1]}' is taken over already"):
                hf.take_over(*methods)
        hf.give_back("awq")
        hf.take_over("awq")
    finally:
        hf.give_back()


# GGUF files


def gguf_file(path: Path, case: str) -> Any:
    from test_gguf_models import write as write_blocks

    return write_blocks(path, case, "Q6_K", 5)


reads_gguf = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("gguf", "accelerate")),
    reason="transformers reads GGUF files with gguf and accelerate",
)


@reads_gguf
def test_the_documents_example(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/transformers.md").read_text()
    (code,) = (b for b in text.split("```python\n") if b.startswith('with hf.taken_over("gguf"'))
    truth = gguf_file(tmp_path / "model.Q4_K_M.gguf", "mistral")
    names: dict[str, Any] = {
        "hf": hf, "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "directory": tmp_path,
    }  # fmt: skip
    exec(compile(code.split("```")[0], "docs/transformers.md", "exec"), names)
    layer = names["model"].model.layers[0].mlp.up_proj
    assert layer.act == "int8"
    dense = truth.model.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.packed.dequantize(), dense.float())


@reads_gguf
@pytest.mark.parametrize("case", ["mistral", "qwen2"])
def test_gguf(case: str, tmp_path: Path) -> None:
    """Blocks of every type; "mistral" is a file of llama's kind, with the rows of q and k in
    another order; "qwen2" has a table that is tied to the head."""
    path = tmp_path / "model.gguf"
    model = gguf_file(path, case).float()
    with hf.taken_over("gguf"):
        taken = load(tmp_path, gguf_file=path.name)
    assert taken.dtype == torch.float32
    state = model.state_dict()
    layers = {p: m for p, m in taken.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}
    assert len(layers) > 10
    for name, module in layers.items():
        assert torch.equal(module.packed.dequantize(), state[f"{name}.weight"]), name
    assert isinstance(taken.model.embed_tokens, QuantEmbedding)
    tied = taken.lm_head.weight is taken.model.embed_tokens.weight
    assert tied == (case == "qwen2")
    assert not tied or taken.lm_head.scale is taken.model.embed_tokens.scale
    want, got = logits(model), logits(taken)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    taken.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", dtype=torch.float32)), got)
