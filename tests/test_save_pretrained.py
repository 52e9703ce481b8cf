"""`save_pretrained`: what is written loads in stock transformers, and back here bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints.safetensors_directory import INDEX, SINGLE
from qkernels.checkpoints.shards import size_in_bytes
from qkernels.nn import QuantLinear
from qkernels.nn.decoder import QuantDecoder
from qkernels.nn.keep import HoldsPacked
from qkernels.quant.quantize import quantize

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")
from test_hf_models import CASES, TINY, random_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::qkernels.convert.QuantWarning")
SIZES = {**TINY, "intermediate_size": 96}  # whole groups of 32
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        **SIZES,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        mlp_bias=True,
        attention_bias=True,
    ),
    "qwen2-tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma3-tied": transformers.Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=16, query_pre_attn_scalar=32
    ),
}
STOCK = """
import sys, torch, transformers
directory, *names = sys.argv[1:]
for name in names:
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/{name}").eval()
    with torch.no_grad():
        logits = model(torch.load(f"{directory}/ids.pt")).logits.float()
    torch.save(logits, f"{directory}/{name}.pt")
assert "qkernels" not in sys.modules
"""


def model_of(case: str, dtype: torch.dtype = torch.float32) -> Any:
    CASES["saved"] = MODELS[case]
    return random_model("saved").to(dtype)


def ids_of(vocab: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(4, vocab, (2, 24), generator=torch.Generator().manual_seed(8))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


SPECS: dict[str, dict[str, Any]] = {
    "W4": {"spec": "W4A16"},
    "W4-row": {"spec": qk.QuantSpec(4, -1, "float32")},
    "W3": {"spec": "W3A16"},
    "W2": {"spec": qk.QuantSpec(2, 16)},
    "W5": {"spec": "W5A16"},
    "W6": {"spec": "W6A16"},
    "W8-groups": {"spec": "W8A16", "group_size": 16},
    "W8-row": {"spec": "W8A16", "group_size": -1},
    "e8m0-scales": {"spec": qk.QuantSpec(4, 16, "e8m0")},
    "mixed": {
        "spec": "W4A16",
        "overrides": {"down_proj": "W8A16", r"layers\.1\..*o_proj": None, "k_proj": "W6A16"},
    },
    "head-too": {"spec": "W4A16", "modules_to_not_convert": ()},
}


@dataclass
class Written:
    """A saved model: its logits here before it was saved, those of stock transformers, and those
    of the dequantized model in float32 and in the model's own type."""

    directory: Path
    ours: torch.Tensor
    exact: torch.Tensor
    dense: torch.Tensor
    stock: torch.Tensor


def cases() -> dict[str, tuple[str, torch.dtype, dict[str, Any]]]:
    found = {
        f"{case}.{name}": (case, torch.float32, {**spec, "act": "float"})
        for case in ("llama", "qwen2-tied")
        for name, spec in SPECS.items()
    }
    found["w8a8"] = ("llama", torch.float32, {"spec": "W8A8", "group_size": -1})
    for scale in ("bfloat16", "float16"):
        spec = {"spec": qk.QuantSpec(4, 32, scale), "act": "float"}
        found[f"bfloat16.{scale}"] = ("qwen2-tied", torch.bfloat16, spec)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """All cases, read by one process of transformers that never imports this package."""
    pytest.importorskip("compressed_tensors", reason="transformers reads them through this package")
    root, ids, found = tmp_path_factory.mktemp("stock"), ids_of(), {}
    torch.save(ids, root / "ids.pt")
    for name, (case, dtype, arguments) in cases().items():
        model = model_of(case, dtype)
        qk.quantize_(model, **arguments)
        qk.save_pretrained(model, root / name, max_shard_size="60KB")
        ours = logits_of(model, ids)
        exact = logits_of(qk.dequantize_(model, torch.float32).float(), ids)
        found[name] = Written(root / name, ours, exact, logits_of(model.to(dtype), ids), ours)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(root), *found],
        capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, model in found.items():
        model.stock = torch.load(root / f"{name}.pt")
    return found


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("case", ["llama", "qwen2-tied"])
def test_stock_transformers_gives_the_same_logits(
    case: str, spec: str, written: dict[str, Written]
) -> None:
    one = written[f"{case}.{spec}"]
    assert (one.directory / INDEX).exists()
    assert relative(one.stock, one.ours) < 1e-4
    decoder = QuantDecoder.from_pretrained(one.directory, act="float", kv_dtype="float32")
    assert relative(decoder(ids_of()).logits, one.ours) < 1e-4


def test_w8a8_is_int_quantized_with_dynamic_activations(written: dict[str, Written]) -> None:
    one = written["w8a8"]
    (group,) = config_of(one.directory)["config_groups"].values()
    assert group["format"] == "int-quantized"
    wanted = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    assert wanted.items() <= group["input_activations"].items()
    # Activations are int8 in both, with scales of their own: per token there, per group here.
    assert 1e-4 < relative(one.stock, one.exact) < 0.1
    assert relative(one.stock, one.ours) < 0.1
    decoder = QuantDecoder.from_pretrained(one.directory, act="float", kv_dtype="float32")
    assert relative(decoder(ids_of()).logits, one.exact) < 1e-4


@pytest.mark.parametrize("scale", ["bfloat16", "float16"])
def test_a_bfloat16_model(scale: str, written: dict[str, Written]) -> None:
    """Everything is exact but the arithmetic, and the scales that bfloat16 rounds there."""
    one = written[f"bfloat16.{scale}"]
    assert config_of(one.directory, whole=True)["dtype"] == "bfloat16"
    theirs = relative(one.dense, one.exact)  # the same weights in the arithmetic of bfloat16
    assert relative(one.stock, one.exact) < (2 if scale == "bfloat16" else 4) * theirs
    assert relative(one.ours, one.exact) < 2 * theirs


def config_of(directory: Path, whole: bool = False) -> dict[str, Any]:
    raw = json.loads((directory / "config.json").read_text())
    return raw if whole else raw["quantization_config"]


def same_packed(one: Any, other: Any) -> None:
    tensors, others = one.tensors(), other.tensors()
    assert one.spec == other.spec and set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "W6A16"])
def test_a_decoder_comes_back_bit_for_bit(scheme: str, case: str, tmp_path: Path) -> None:
    model = model_of(case)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "tokenizer_config.json").write_text("{}")
    decoder = QuantDecoder.from_pretrained(tmp_path / "float", scheme, kv_dtype="float32")
    qk.save_pretrained(decoder, tmp_path / "out")
    again = QuantDecoder.from_pretrained(tmp_path / "out", act=decoder.act, kv_dtype="float32")
    modules = dict(again.named_modules())
    packed = 0
    for path, module in decoder.named_modules():
        if isinstance(module, HoldsPacked):
            same_packed(module.packed, modules[path].packed)
            packed += 1
    scales = {
        tensor.dtype
        for name, tensor in load_file(tmp_path / "out" / SINGLE).items()
        if name.endswith("scale")
    }
    assert scales == {torch.float32}  # on disk, as the model; 16 bits here
    assert packed == 7 * TINY["num_hidden_layers"] + ("tied" not in case)
    assert torch.equal(again(ids_of()).logits, decoder(ids_of()).logits)
    assert again.settings == decoder.settings and again.settings.repetition_penalty == 1.5
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    # and what came from compressed-tensors is written so again, the same
    qk.save_pretrained(again, tmp_path / "twice")
    assert (tmp_path / "twice" / SINGLE).read_bytes() == (tmp_path / "out" / SINGLE).read_bytes()


def test_packed_tables_are_for_those_who_read_them(tmp_path: Path) -> None:
    model = model_of("qwen2-tied")
    model.save_pretrained(tmp_path / "float")
    w4, w8 = "W4A16", qk.QuantSpec(8, -1)
    decoder = QuantDecoder.from_pretrained(
        tmp_path / "float", w4, embeddings=w8, kv_dtype="float32"
    )
    with pytest.raises(ValueError, match=r"model\.embed_tokens is packed, which transformers does"):
        qk.save_pretrained(decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    qk.save_pretrained(decoder, tmp_path / "out", packed_embeddings=True)
    again = QuantDecoder.from_pretrained(tmp_path / "out", act=decoder.act, kv_dtype="float32")
    assert again.composed_because() is None
    assert torch.equal(again(ids_of()).logits, decoder(ids_of()).logits)
    # a module whose head is tied to its table: written once
    qk.quantize_(model, w4, embeddings=w8)
    qk.save_pretrained(model, tmp_path / "module", packed_embeddings=True)
    assert (tmp_path / "module" / SINGLE).stat().st_size == pytest.approx(
        (tmp_path / "out" / SINGLE).stat().st_size, rel=0.02
    )
    same = QuantDecoder.from_pretrained(tmp_path / "module", act="float", kv_dtype="float32")
    same_packed(same.embed.packed, decoder.embed.packed)


def test_zero_points_and_orders_are_written_with_a_warning(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "float")
    spec = qk.QuantSpec(4, 16, zero="integer")
    decoder = QuantDecoder.from_pretrained(
        tmp_path / "float", spec, act="float", kv_dtype="float32"
    )
    order = torch.arange(64) // 16
    order = order[torch.randperm(64, generator=torch.Generator().manual_seed(1))].int()
    weight = decoder.layers[0].q.packed.dequantize()
    ordered = quantize(weight, qk.QuantSpec(4, 16, act_order=True), g_idx=order).pack()
    decoder.layers[0].q = QuantLinear(ordered, decoder.layers[0].q.bias, "float")
    decoder._resolved = decoder._executor = None
    with pytest.warns(UserWarning) as said:
        qk.save_pretrained(decoder, tmp_path / "out")
    words = [str(w.message) for w in said]
    assert any("21 layers have zero points" in w for w in words)
    assert any("1 layers have columns in act-order" in w for w in words)
    again = QuantDecoder.from_pretrained(tmp_path / "out", act="float", kv_dtype="float32")
    same_packed(again.layers[0].q.packed, ordered)
    same_packed(again.layers[2].down.packed, decoder.layers[2].down.packed)
    assert torch.equal(again(ids_of()).logits, decoder(ids_of()).logits)


def test_formats_that_cannot_be_held_are_named(tmp_path: Path) -> None:
    for spec, words in (
        (qk.QuantSpec(4, 16, zero="minimum"), "groups have minima; choose zero='symmetric' or"),
        (qk.QuantSpec(4, 32, "int8"), "scales have two levels; choose a flat scale"),
        (qk.QuantSpec(4, 16, table=(*range(-8, 8),)), "codes mean values of a table; choose W2"),
    ):
        model = model_of("llama")
        qk.quantize_(model, "W4A16", overrides={r"layers\.1.*q_proj": spec})
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=rf"model\.layers\.1\.self_attn\.q_proj \(.*{words}"):
            qk.save_pretrained(model, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    decoder = QuantDecoder.from_pretrained(model_of("llama"), qk.QuantSpec(4, 64))
    with pytest.raises(ValueError, match=r"down_proj.* \(.*64 does not divide its 96 columns"):
        qk.save_pretrained(decoder, tmp_path / "out")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    qk.quantize_(model)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn was a Conv1D"):
        qk.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="no layer of the model is quantized"):
        qk.save_pretrained(model_of("llama"), tmp_path / "out")
    with pytest.raises(TypeError, match="transformers model or a QuantDecoder, got Linear"):
        qk.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")


def test_a_gguf_decoder_is_refused(model_path: Path, tmp_path: Path) -> None:
    decoder = QuantDecoder.from_pretrained(model_path)
    with pytest.raises(ValueError, match=r"\.gguf is no transformers model"):
        qk.save_pretrained(decoder, tmp_path / "out")


def test_directories_change_only_in_the_end(tmp_path: Path, monkeypatch: Any) -> None:
    model = model_of("llama")
    qk.quantize_(model)
    out = tmp_path / "out"
    out.mkdir()
    qk.save_pretrained(model, out)  # an empty one is as good as none
    good = (out / SINGLE).read_bytes()
    with pytest.raises(FileExistsError, match="out: the directory is not empty"):
        qk.save_pretrained(model, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file: expected a directory, it is a file"):
        qk.save_pretrained(model, tmp_path / "file", overwrite=True)

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("qkernels.saving._write_json", fails)
        with pytest.raises(OSError, match="disk full"):
            qk.save_pretrained(model, out, overwrite=True)
    assert (out / SINGLE).read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
    (out / "stale.txt").write_text("x")
    qk.save_pretrained(model, out, overwrite=True)
    assert not (out / "stale.txt").exists() and (out / SINGLE).read_bytes() == good


def test_only_directories_of_models_are_replaced(tmp_path: Path) -> None:
    model = model_of("llama")
    qk.quantize_(model)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not replaced: it is no model"):
        qk.save_pretrained(model, out, overwrite=True)
    (out / "config.json").write_text("{}")
    (out / "inner").mkdir()
    with pytest.raises(FileExistsError, match="not replaced: the directory inner in it"):
        qk.save_pretrained(model, out, overwrite=True)
    assert (out / "thesis.txt").exists()
    # A link stays a link, and what it points to is written.
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    qk.save_pretrained(model, link)
    assert link.is_symlink() and (disk / SINGLE).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link", "out"]


@pytest.mark.parametrize("how", ["module", "weight"])
def test_shared_layers_are_written_at_every_path(how: str, tmp_path: Path) -> None:
    """A tie that the class of the model does not make is not made again by whoever loads it."""
    model = model_of("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    if how == "module":
        second.mlp = first.mlp
    else:
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    qk.quantize_(model)
    qk.save_pretrained(model, tmp_path / "out")
    decoder = QuantDecoder.from_pretrained(tmp_path / "out", act="float", kv_dtype="float32")
    same_packed(decoder.layers[1].up.packed, decoder.layers[0].up.packed)
    difference = decoder(ids_of()).logits - logits_of(model, ids_of())
    assert difference.abs().max() < 1e-3


def test_sizes() -> None:
    assert [size_in_bytes(s) for s in ("5GB", "300 MB", "1KiB", "7", 9)] == [5e9, 3e8, 1024, 7, 9]
    for size in ("big", "0GB", -1, True, None, "5XB"):
        with pytest.raises(ValueError, match="max_shard_size must be like '5GB'"):
            size_in_bytes(size)  # type: ignore[arg-type]


def test_groups_name_their_layers_and_the_class_comes_last(tmp_path: Path) -> None:
    model = model_of("llama")
    dense = {r"layers\.1\..*o_proj": None}
    qk.quantize_(model, "W4A8", overrides={"down_proj": qk.QuantSpec(8, -1), **dense}, act="int8")
    qk.save_pretrained(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    named, most = config["config_groups"].values()
    assert named["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert (named["format"], most["format"]) == ("int-quantized", "pack-quantized")
    assert most["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    decoder = QuantDecoder.from_pretrained(tmp_path / "out")
    assert decoder.layers[0].down.packed.spec.bits == 8
    assert decoder.layers[0].q.packed.spec.bits == 4
    assert not isinstance(decoder.layers[1].o, HoldsPacked)
