"""`from_pretrained` with a QKernelsConfig: what `quantize_` makes, saved and loaded again bit for
bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels import hf
from qkernels.checkpoints import CheckpointError
from qkernels.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers", reason="the host")
from qkernels.hf.stored import Noted, note, read_note  # noqa: E402

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
MINIMA = qk.QuantSpec(8, 32, zero="minimum")

# What stock transformers does with what was saved: the method, and what it then says.
STOCK = """
import sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qkernels":
            raise ImportError("qkernels is not installed")

sys.meta_path.insert(0, Blocked())
import transformers
directory, *names = sys.argv[1:]
for name in names:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/{name}")
        with torch.no_grad():
            torch.save(model(torch.load(f"{directory}/ids.pt")).logits, f"{directory}/{name}.pt")
        print(name, "loaded")
    except (RuntimeError, ValueError) as error:
        print(name, "refused", type(error).__name__)
"""


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of float models: tied, untied, bfloat16."""
    at = tmp_path_factory.mktemp("float")
    for name, tied, dtype in (
        ("tied", True, torch.float32),
        ("untied", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
    ):
        torch.manual_seed(11)
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
        model = transformers.Qwen2ForCausalLM(config)
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            torch.nn.init.normal_(parameter)
        model.to(dtype).save_pretrained(at / name)
    return at


def load(directory: Path, **kwargs: Any) -> Any:
    hf.register()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def same_state(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].float(), b[n].float()) for n in a
    )


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "W4A16": ("tied", {"spec": "W4A16", "group_size": 64}, "compressed-tensors"),
    "W4A8": ("bfloat16", {"spec": "W4A8"}, "compressed-tensors"),
    "W8A8 by row": ("untied", {"spec": "W8A8", "group_size": -1}, "compressed-tensors"),
    "mixed": (
        "untied",
        {"spec": "W6A16", "overrides": {"down": "W8A8", r"layers\.1\..*o_proj": None}},
        "compressed-tensors",
    ),
    "a head apart": ("tied", {"modules_to_not_convert": ()}, "compressed-tensors"),
    "hqq": ("tied", {"spec": "W3A16", "algo": "hqq"}, "compressed-tensors"),
    "zero points": (
        "bfloat16",
        {"spec": qk.QuantSpec(4, 32, zero="integer")},
        "compressed-tensors",
    ),
    "bfloat16 scales": ("tied", {"spec": qk.QuantSpec(4, 64, "bfloat16")}, "compressed-tensors"),
    "MXFP4": ("untied", {"spec": "MXFP4"}, "qkernels"),
    "two levels": ("bfloat16", {"spec": qk.QuantSpec(4, 32, "uint4", "minimum")}, "qkernels"),
    "minima": ("tied", {"spec": MINIMA, "act": "int8"}, "qkernels"),
    "a table, and its head": ("tied", {"embeddings": "W8A8"}, "qkernels"),
    "a table": ("untied", {"embeddings": "W8A8"}, "qkernels"),
}


@pytest.mark.parametrize("case", CASES)
def test_as_quantize_and_saved_and_loaded_again(case: str, floats: Path, tmp_path: Path) -> None:
    which, arguments, method = CASES[case]
    arguments = {"spec": "W4A16", **arguments}
    dtype = torch.bfloat16 if which == "bfloat16" else torch.float32
    config = hf.QKernelsConfig(**arguments)
    model = load(floats / which, dtype=dtype, quantization_config=config)
    want = load(floats / which, dtype=dtype).eval()
    report = qk.quantize_(want, **arguments)
    assert same_state(model, want) and torch.equal(logits(model), logits(want))
    assert str(model.hf_quantizer.report) == str(report)
    assert config.stored is None  # it serves for the next model too
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert raw["quant_method"] == method
    again = load(tmp_path, dtype=dtype)
    assert same_state(again, model) and torch.equal(logits(again), logits(model))
    layers = [m for m in again.modules() if isinstance(m, QuantLinear)]
    assert [m.act for m in layers] == [m.act for m in model.modules() if isinstance(m, QuantLinear)]
    head, table = again.lm_head, again.model.embed_tokens
    tied = which != "untied" and case != "a head apart"
    assert (head.weight is table.weight) == tied
    if isinstance(table, QuantEmbedding) and tied:
        assert head.scale is table.scale
    # And once more: what was loaded is saved as it is.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=dtype)), logits(model))


def test_without_this_package(floats: Path, tmp_path: Path) -> None:
    """Stock transformers computes with the same values, or refuses; never with others."""
    pytest.importorskip("compressed_tensors", reason="transformers reads them through this package")
    saves: dict[str, tuple[dict[str, Any], bool]] = {
        "w4": ({"spec": "W4A16"}, True),
        "zeros": ({"spec": qk.QuantSpec(4, 32, zero="integer")}, False),
        "minima": ({"spec": qk.QuantSpec(8, -1, zero="minimum")}, False),  # 64 x 64 is 64 x 64
        "table": ({"spec": "W4A16", "embeddings": "W8A16"}, False),
    }
    torch.save(IDS, tmp_path / "ids.pt")
    models = {}
    for name, (arguments, _) in saves.items():
        config = hf.QKernelsConfig(**arguments)
        models[name] = load(floats / "tied", dtype=torch.float32, quantization_config=config)
        models[name].save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path), *saves],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line)
    for name, (_, loads) in saves.items():
        assert said[name] == ("loaded" if loads else "refused RuntimeError"), name
        if loads:
            want = logits(qk.dequantize_(models[name]))
            torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), want)
    assert "Unknown quantization type, got qkernels" in done.stderr


def test_it_is_registered_by_name_and_taken_from_a_mapping(floats: Path) -> None:
    asked = {"quant_method": "qkernels", "spec": "W8A16", "overrides": {"down": None}}
    model = load(floats / "tied", quantization_config=asked)
    assert str(model.model.layers[0].mlp.up_proj.spec) == "W8 g32 float16"
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    config = hf.QKernelsConfig(MINIMA, overrides={"down": "W4A16", "up": None})
    assert hf.QKernelsConfig.from_dict(json.loads(json.dumps(config.to_dict()))).spec == MINIMA
    assert "QKernelsConfig" in repr(config)
    hf.register()  # again is nothing


@pytest.mark.parametrize("case", ["W4A16", "minima"])
def test_devices_and_offload(case: str, floats: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="it places and offloads")
    which, arguments, _ = CASES[case]
    config = hf.QKernelsConfig(**arguments)
    whole = load(floats / which, dtype=torch.float32, quantization_config=config)
    want = logits(whole)
    whole.save_pretrained(tmp_path / "saved")
    auto = load(floats / which, dtype=torch.float32, quantization_config=config, device_map="auto")
    assert torch.equal(logits(auto), want)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    for source, how in (
        (floats / which, {"quantization_config": config}),
        (tmp_path / "saved", {}),
    ):
        away = load(
            source, dtype=torch.float32, device_map=places,
            offload_folder=str(tmp_path / f"off-{bool(how)}"), **how,
        )  # fmt: skip
        assert away.model.layers[1].mlp.up_proj.weight.is_meta
        assert torch.equal(logits(away), want)
        with pytest.raises(ValueError, match=r"layers\.1\..* offloaded by device_map"):
            away.save_pretrained(tmp_path / "never")


def test_types_gradients_and_compilation(floats: Path) -> None:
    model = load(
        floats / "tied", dtype=torch.float32, quantization_config=hf.QKernelsConfig("W4A16")
    )
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone(), layer.scale.clone()
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    assert not any(
        p.requires_grad
        for m in model.modules()
        if isinstance(m, QuantLinear)
        for p in m.parameters()
    )
    out = model(inputs_embeds=torch.randn(1, 4, 64, requires_grad=True), labels=IDS[:1, :4])
    out.loss.backward()
    assert model.model.norm.weight.grad is not None
    mlp, x = model.model.layers[1].mlp, torch.randn(1, 5, 64)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x))
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.scale, before[1])


def test_what_no_config_is() -> None:
    with pytest.raises(ValueError, match="unknown scheme 'W7A16'"):
        hf.QKernelsConfig("W7A16")
    with pytest.raises(ValueError, match="algo must be one of"):
        hf.QKernelsConfig(algo="gptq")
    with pytest.raises(TypeError, match="list of names"):
        hf.QKernelsConfig(modules_to_not_convert="lm_head")
    with pytest.raises(ValueError, match="unknown bits, sym; known are spec, group_size"):
        hf.QKernelsConfig.from_dict({"quant_method": "qkernels", "bits": 4, "sym": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight"),
            "missing weights of .*0.mlp.up_proj",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64)}),
            r"layers.0.mlp.up_proj.weight must be \[128, 64\], got \[64, 64\]",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[70].fill_(float("inf")),
            "up_proj.weight holds inf at row 1, column 6",
        ),
    ],
    ids=["missing", "misshapen", "not finite"],
)
def test_damaged_float_models(change: Any, message: str, floats: Path, tmp_path: Path) -> None:
    tensors = load_file(floats / "tied" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((floats / "tied" / "config.json").read_text())
    with pytest.raises((CheckpointError, ValueError), match=message):
        load(tmp_path, quantization_config=hf.QKernelsConfig("W4A16"))


def edited(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw["quantization_config"])
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), "version must be 1, got 2: it was written by another"),
        (
            lambda q: q["layers"].update({"model.nowhere": [0, 64, 64]}),
            "no linear .* model.nowhere",
        ),
        (
            lambda q: q["layers"].update({"model.layers.0.mlp.up_proj": [0, 128, 32]}),
            r"up_proj was saved as \[128, 32\], the model wants \[128, 64\]",
        ),
        (
            lambda q: q["layers"].update({"model.layers.0.mlp.up_proj": [9, 128, 64]}),
            "got \\[9, 128",
        ),
        (lambda q: q["schemes"][0]["spec"].update(bits=7), "scheme 0: QuantSpec: bits must be"),
        (lambda q: q["schemes"][0].update(act="int4"), "scheme 0: act 'int4' is unknown"),
        (lambda q: q.pop("layers"), "unknown schemes, tied, version; known are spec"),
    ],
)
def test_notes_that_do_not_fit(change: Any, message: str, floats: Path, tmp_path: Path) -> None:
    load(floats / "tied", quantization_config=hf.QKernelsConfig(MINIMA)).save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises((CheckpointError, ValueError), match=message):
        load(tmp_path)


def test_a_config_that_asks_is_not_a_model_that_has(floats: Path, tmp_path: Path) -> None:
    tensors = load_file(floats / "tied" / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((floats / "tied" / "config.json").read_text())
    raw["quantization_config"] = hf.QKernelsConfig("W4A16").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not written by save_pretrained"):
        load(tmp_path)


def test_damaged_packed_layers(floats: Path, tmp_path: Path) -> None:
    load(floats / "tied", quantization_config=hf.QKernelsConfig(MINIMA)).save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for part, value, message in (
        ("scale", None, f"missing: {name}.scale"),
        ("weight", good[f"{name}.weight"][:-1], r"weight \(expected \[8192\], got \[8191\]\)"),
        ("scale", good[f"{name}.scale"] * float("nan"), "scale has values that are not finite"),
    ):
        tensors = {**good, f"{name}.{part}": value}
        kept = {n: t for n, t in tensors.items() if t is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_a_note_says_what_it_was_told() -> None:
    layers = {
        "a": Noted(qk.QuantSpec(4), "int8", 64, 32),
        "b": Noted(qk.QuantSpec(4), "int8", 1, 2),
        "c": Noted(qk.QuantSpec.from_scheme("MXFP4"), "auto", 3, 4),
    }
    noted = json.loads(json.dumps(note(layers, {"d": "a"})))
    assert len(noted["schemes"]) == 2 and read_note(noted, "x") == (layers, {"d": "a"})


def test_the_hooks_of_transformers_are_there() -> None:
    """Names that are not in its documentation."""
    from transformers import conversion_mapping, core_model_loading
    from transformers.distributed import tensor_parallel
    from transformers.quantizers import auto, base

    for where, name in (
        (conversion_mapping, "get_model_conversion_mapping"),
        (core_model_loading, "ConversionOps"),
        (core_model_loading, "WeightConverter"),
        (core_model_loading, "WeightRenaming"),
        (tensor_parallel, "ALL_PARALLEL_STYLES"),
        (tensor_parallel, "TensorParallelLayer"),
        (auto, "AUTO_QUANTIZATION_CONFIG_MAPPING"),
        (auto, "AUTO_QUANTIZER_MAPPING"),
        (base.HfQuantizer, "get_state_dict_and_metadata"),
        (base.HfQuantizer, "get_weight_conversions"),
    ):
        assert hasattr(where, name), f"{where.__name__}.{name}"


def test_the_documents_examples(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/transformers.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    first, second = (b for b in blocks if b.startswith(("import torch", "from qkernels import hf")))
    names: dict[str, Any] = {"path": floats / "tied", "out": tmp_path}
    exec(compile(first, "docs/transformers.md", "exec"), names)
    assert "quantized" in capsys.readouterr().out
    assert same_state(names["again"].bfloat16(), names["model"])
    names["path"] = tmp_path
    exec(compile(second, "docs/transformers.md", "exec"), names)
    assert same_state(names["model"].bfloat16(), names["again"])


@pytest.mark.parametrize("spec", ["W8A16", MINIMA], ids=["W8A16", "minima"])
def test_save_pretrained_of_a_model_that_quantize_changed(
    floats: Path, tmp_path: Path, spec: Any
) -> None:
    """Codes of 8 bits have the shapes of the weights that they stand for: without a word of what
    they are, a reload would take them for weights."""
    model = load(floats / "untied")
    qk.quantize_(model, spec, progress=False)
    with torch.no_grad():
        said = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, said)
    qk.dequantize_(model)
    assert model.hf_quantizer is None
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(dense(IDS).logits, model(IDS).logits)
