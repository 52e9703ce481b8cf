"""`qkernels quantize` and `quantize_directory`: a float directory to a quantized one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.checkpoints import CheckpointError
from qkernels.checkpoints.safetensors_directory import SINGLE
from qkernels.models import UnsupportedModelError
from qkernels.nn.decoder import QuantDecoder

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")
pytest.importorskip("typer", reason="the command line needs the extra [cli]")
pytest.importorskip("rich", reason="the command line needs the extra [cli]")
from test_save_pretrained import ids_of, model_of, relative  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from qkernels.cli.app import app  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::qkernels.convert.QuantWarning")


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = model_of("qwen2-tied")
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "float", max_shard_size="40KB")
    (tmp_path / "float" / "tokenizer_config.json").write_text('{"a": 1}')
    return tmp_path / "float"


def test_the_command_writes_what_quantize_makes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, out, "--algo", "rtn", "--skip", "layers.1")
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp.down_proj" in result.stdout and "W4 g32" in result.stdout
    assert "modules_to_not_convert names 'layers.1'" in result.stdout
    assert "of safetensors became" in result.stderr
    model = model_of("qwen2-tied")
    keep = ("lm_head", "layers.1")
    qk.quantize_(model, "W4A16", algo="rtn", modules_to_not_convert=keep)
    qk.save_pretrained(model, tmp_path / "same")
    written, same = load_file(out / SINGLE), load_file(tmp_path / "same" / SINGLE)
    assert set(written) == set(same)
    assert all(torch.equal(written[name], same[name]) for name in same)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"a": 1}
    decoder = QuantDecoder.from_pretrained(out, act="float", kv_dtype="float32")
    assert decoder.settings.repetition_penalty == 1.5
    with torch.no_grad():
        assert relative(decoder(ids_of()).logits, model(ids_of()).logits) < 1e-4


@pytest.mark.parametrize("architectures", [["Qwen2ForCausalLM"], ["NoSuchModel"], None])
def test_bfloat16_models_get_bfloat16_scales(
    architectures: Any, source: Path, tmp_path: Path
) -> None:
    model_of("qwen2-tied", torch.bfloat16).save_pretrained(source, max_shard_size="40KB")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = architectures  # AutoModelForCausalLM knows it by model_type
    (source / "config.json").write_text(json.dumps(config))
    report = qk.quantize_directory(source, tmp_path / "out", "W6A16", group_size=64)
    written = load_file(tmp_path / "out" / SINGLE)
    name = "model.layers.0.self_attn.q_proj"
    assert written[f"{name}.weight_scale"].dtype == torch.bfloat16
    assert written["model.norm.weight"].dtype == torch.bfloat16
    assert written[f"{name}.weight_packed"].shape == (64, 64 * 6 // 32)
    assert report.nbytes == (tmp_path / "out" / SINGLE).stat().st_size
    assert report.nbytes < 0.7 * report.nbytes_before


def test_packed_embeddings(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--spec", "W4A8", "--embeddings", "W8A16")
    assert result.exit_code == 0, result.output
    assert "packed embeddings are read by qkernels, not by transformers" in result.stderr
    decoder = QuantDecoder.from_pretrained(tmp_path / "out")
    assert decoder.composed_because() is None and decoder.config.tied


def test_what_is_no_float_model_is_refused_before_anything_is_read(
    source: Path, model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(words: str, *options: Any, model: Path = source, target: Path = out) -> None:
        before = sorted(tmp_path.rglob("*"))
        result = run(model, target, *options)
        assert result.exit_code == 2, result.output
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1, result.stderr
        assert words in result.stderr
        assert sorted(tmp_path.rglob("*")) == before

    refused("no such file or directory", model=tmp_path / "nowhere")
    refused("a GGUF file is quantized already", model=model_path)
    refused("expected config.json and safetensors, found no config", model=tmp_path)
    refused("exists already (--overwrite replaces it)", target=source)
    refused("expected another directory than that of", "--overwrite", target=source)
    refused("not replaced", "--overwrite", target=source.parent)  # the model lies in it
    refused("unknown scheme 'W7A16'", "--spec", "W7A16")
    refused("codes mean values of a table; choose W2 to W8", "--spec", "MXFP4")
    refused("group_size must be a positive multiple of 16", "--group-size", 24)
    refused("algo", "--algo", "magic")
    refused("'nonsense', which is no module of the model", "--skip", "nonsense")
    refused("max_shard_size must be like '5GB', or bytes, got 'huge'", "--max-shard-size", "huge")
    config = json.loads((source / "config.json").read_text())
    for change, words in (
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantized already (awq); expected a fl",
        ),
        ({"dtype": "float8"}, "dtype 'float8' is not supported; supported are float32, float16, b"),
        (
            {"model_type": "none", "architectures": None},
            "transformers cannot make the model (none)",
        ),
    ):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        refused(words)


def test_tensors_that_are_not_the_models_are_named(source: Path, tmp_path: Path) -> None:
    model_of("qwen2-tied").save_pretrained(source, max_shard_size="1GB")
    for path in source.glob("model-*"):
        path.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    good, q = load_file(source / SINGLE), "model.layers.2.self_attn.q_proj.weight"

    def refused(words: str, **changes: torch.Tensor | None) -> None:
        kept = {k: v for k, v in {**good, **changes}.items() if v is not None}
        save_file(kept, source / SINGLE)
        with pytest.raises(ValueError, match=words):
            qk.quantize_directory(source, tmp_path / "out", progress=lambda *_: None)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["float"]

    refused(f"missing {q}", **{q: None})
    refused("unexpected: model.layers.9.extra", **{"model.layers.9.extra": torch.zeros(3)})
    refused(rf"{q} must be \[64, 64\], got \[32, 64\]", **{q: torch.zeros(32, 64)})
    refused(q, **{q: torch.full((64, 64), torch.nan)})
    refused(q, **{q: torch.zeros(64, 64, dtype=torch.int32)})
    (source / SINGLE).write_bytes((source / SINGLE).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        qk.quantize_directory(source, tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="GGUF file is quantized already"):
        qk.quantize_directory(tmp_path / "x.gguf", tmp_path / "out")
