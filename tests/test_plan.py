"""Plans against what loading takes: weights to the byte, the cache and registers as they are made,
the arithmetic of speeds, errors, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_writer import write_llama

from qkernels.checkpoints import CheckpointError
from qkernels.estimate import (
    DENSE_SHARE,
    FEW_SHARE,
    KV_SHARE,
    LAYER_SECONDS,
    OP_SECONDS,
    READ_SHARE,
    Estimate,
    register_shapes,
)
from qkernels.machines import GPUS, Machine, available, machine_of, named_gpu, read_rate
from qkernels.models import UnsupportedModelError
from qkernels.nn.decoder import QuantDecoder
from qkernels.nn.executor import NativeExecutor
from qkernels.nn.pool import KvPool
from qkernels.outline import outline
from qkernels.plan import Plan, plan
from qkernels.quant import PackedWeight, QuantSpec

MACHINE = Machine("a machine", "cpu", 8 * 10**9, 3 * 10**8, 4e10, 1e12, 2e11, "made up")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plan") / "tiny.gguf", context=4096)


def dense_directory(folder: Path, tied: bool = False) -> Path:
    """A float model as transformers writes it, without transformers."""
    from families import weights
    from safetensors.torch import save_file

    from qkernels.models import family_of_hf

    raw = {
        "model_type": "llama", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }  # fmt: skip
    config = family_of_hf("llama").from_hf(raw)
    generator = torch.Generator().manual_seed(0)
    tensors = {d.hf: torch.randn(d.shape, generator=generator).bfloat16() for d in weights(config)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# Weights


def same_weights(path: Path, **kinds: Any) -> None:
    loaded = QuantDecoder.from_pretrained(path, device="cpu", max_seq_len=64, **kinds)
    planned = QuantDecoder(outline(path, **kinds), max_seq_len=64)
    assert planned.device.type == "meta"
    assert (planned.nbytes, planned.weight_bytes) == (loaded.nbytes, loaded.weight_bytes)
    ours, theirs = planned.state_dict(), loaded.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "IQ4_XS", "MXFP4", "BF16"]
)
@pytest.mark.parametrize("output", [None, "Q6_K"])
def test_weights_of_gguf_files_are_exact(kind: str, output: str | None, tmp_path: Path) -> None:
    sizes = {"hidden": 256, "ffn": 512, "layers": 1, "vocab": 300}
    same_weights(write_llama(tmp_path / "m.gguf", kind=kind, output=output, **sizes))


@pytest.mark.parametrize(
    ("tied", "kinds"),
    [
        (False, {}),
        (True, {}),
        (False, {"spec": QuantSpec(3, 64, zero="minimum"), "embeddings": QuantSpec(8)}),
        (True, {"spec": QuantSpec(8, -1)}),
    ],
    ids=["dense", "dense-tied", "W3-and-table", "W8-tied"],
)
def test_weights_of_float_directories_are_exact(
    tied: bool, kinds: dict[str, Any], tmp_path: Path
) -> None:
    same_weights(dense_directory(tmp_path / "m", tied), **kinds)


@pytest.mark.parametrize("method", ["gptq", "gptq-act-order", "awq", "compressed-tensors"])
def test_weights_of_quantized_directories_are_exact(method: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the models are those of transformers")
    from checkpoint_writers import (
        awq_tensors,
        ct_config,
        gptq_tensors,
        group_config,
        packed_tensors,
        quantize_linears,
        round_to_nearest,
        write,
    )  # fmt: skip
    from test_quantized_checkpoints import model_of

    order = method == "gptq-act-order"
    model = model_of("llama")
    symmetric = method == "compressed-tensors"
    matrices = quantize_linears(
        model, lambda _, w: round_to_nearest(w, 4, 32, symmetric=symmetric, act_order=order)
    )
    if method == "awq":
        tensors = {path: awq_tensors(m) for path, m in matrices.items()}
        config: dict[str, Any] = {"zero_point": True, "bits": 4, "group_size": 32}
    elif symmetric:
        tensors = {path: packed_tensors(m) for path, m in matrices.items()}
        weights = group_config(4, group_size=32, strategy="group", symmetric=True)
        config = ct_config("pack-quantized", weights)
    else:
        tensors = {path: gptq_tensors(m) for path, m in matrices.items()}
        config = {"bits": 4, "group_size": 32, "desc_act": order, "sym": False}
    write(tmp_path, model, tensors, {"quant_method": method.removesuffix("-act-order"), **config})
    same_weights(tmp_path)


# Memory


def test_the_cache_is_as_large_as_planned(tiny: Path) -> None:
    for kv_dtype, context, batch in (("float16", 200, 1), ("int8", 130, 3), ("int4", 64, 2)):
        found = plan(tiny, MACHINE, context=context, batch=batch, kv_dtype=kv_dtype)
        decoder = QuantDecoder.from_pretrained(
            tiny, device="cpu", max_seq_len=context, kv_dtype=kv_dtype
        )
        pool = KvPool(decoder, [context] * batch)
        pool.forward([(pool.add(), [1] * context) for _ in range(batch)])
        assert found.memory.kv == pool._cache.nbytes
        assert found.kv_token_bytes == pool._cache.bytes_per_token


@pytest.mark.parametrize("act", ["int8", "float"])
def test_registers_are_those_of_the_native_step(
    act: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkernels.nn import executor

    seen: list[Any] = []
    add = executor._Encoder.add

    def kept(self: Any, step: Any) -> None:
        seen.append(self)
        add(self, step)

    monkeypatch.setattr(executor._Encoder, "add", kept)
    decoder = QuantDecoder.from_pretrained(tiny, device="cpu", act=act, max_seq_len=64)
    assert isinstance(decoder.executor(), NativeExecutor)
    encoder = seen[-1]
    ours = register_shapes(decoder.lowered(), decoder.weights())
    assert ours == {name: encoder.registers[i] for name, i in encoder._index.items()}


def test_memory_in_all_is_near_that_of_the_parts_that_are_made(model_path: Path) -> None:
    """Weights, pages and tables of the loaded model, against the plan without what belongs to the
    process."""
    context = 4096
    found = plan(model_path, MACHINE, context=context)
    decoder = QuantDecoder.from_pretrained(model_path, device="cpu", max_seq_len=context)
    pool = KvPool(decoder, [context])
    pool._cache.ensure(context)
    tables = sum(decoder.weights()[name].nbytes for name in decoder.config.ropes)
    real = decoder.nbytes + pool._cache.nbytes + tables
    memory = found.memory
    assert (memory.weights, found.step_weight_bytes) == (decoder.nbytes, decoder.weight_bytes)
    assert memory.weights + memory.kv + memory.tables == real
    planned = memory.running - memory.process - memory.text
    assert abs(planned / real - 1) <= 0.2
    assert memory.while_loading >= memory.process + decoder.nbytes


def test_the_longest_context_is_the_longest(tiny: Path) -> None:
    small = replace(MACHINE, memory=MACHINE.process + 14 * 10**6)
    found = plan(tiny, small, context=4096, batch=8)
    assert not found.fits and 0 < found.max_context < 4096
    assert plan(tiny, small, context=found.max_context, batch=8).fits
    assert not plan(tiny, small, context=found.max_context + 1, batch=8).fits
    assert plan(tiny, MACHINE, context=100).max_context == 4096
    assert plan(tiny, replace(MACHINE, memory=1000), context=100).max_context == 0


def parsed(suggestion: str) -> dict[str, Any]:
    words = suggestion.split(":")[0].split()
    pairs = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}
    return {k: int(v) if v.isdigit() else v for k, v in pairs.items()}


def test_suggestions_fit(tiny: Path, tmp_path: Path) -> None:
    asked = {"context": 4096, "batch": 8}
    need = plan(tiny, MACHINE, **asked).memory
    small = replace(MACHINE, memory=need.peak - need.kv // 3)
    found = plan(tiny, small, **asked)
    names = [set(parsed(s)) for s in found.suggestions]
    assert names == [{"context"}, {"batch"}, {"kv_dtype"}]
    for suggestion in found.suggestions:
        assert plan(tiny, small, **{**asked, **parsed(suggestion)}).fits, suggestion
    folder = dense_directory(tmp_path / "m")
    need = plan(folder, MACHINE, context=64).memory
    packed = plan(folder, MACHINE, context=64, spec="W4A8").memory
    # Small models are mostly what loading takes beside them, so the room is for the weights alone.
    between = replace(MACHINE, memory=(need.peak + packed.peak) // 2)
    said = plan(folder, between, context=64).suggestions
    if packed.peak < need.peak:
        assert any(s.startswith("--spec") for s in said)
    else:
        assert said
    nothing = plan(folder, replace(MACHINE, memory=10), context=64).suggestions
    assert len(nothing) == 1 and nothing[0].startswith("nothing:")


# Speed


def test_seconds_of_a_step_are_bytes_over_the_bandwidth(tiny: Path) -> None:
    model = Estimate(outline(tiny), MACHINE, "auto", "auto", "int8", 1024, False)
    config = model.config
    weights = QuantDecoder.from_pretrained(tiny, device="cpu", max_seq_len=64).weight_bytes
    row = 2 * config.kv_heads * (config.head_dim + 4)
    first = weights / (READ_SHARE * 4e10) + config.layers * LAYER_SECONDS
    kv = 1000 * config.layers * row / (KV_SHARE["int8"] * 4e10)
    assert model.step_seconds(0, 1) == pytest.approx(first, rel=1e-12)
    assert model.step_seconds(1000, 1) == pytest.approx(first + kv, rel=1e-12)
    elements = sum(
        w.n * w.k for w in outline(tiny).weights.values() if isinstance(w, PackedWeight)
    )  # the table is the head too
    further = 2 * elements / (FEW_SHARE * 1e12)
    assert model.step_seconds(1000, 4) == pytest.approx(first + 4 * kv + 3 * further, rel=1e-12)
    twice = replace(MACHINE, read=8e10)
    faster = Estimate(outline(tiny), twice, "auto", "auto", "int8", 1024, False)
    assert faster.step_seconds(1000, 1) < model.step_seconds(1000, 1)


def test_seconds_of_a_dense_model_count_its_ops(tmp_path: Path) -> None:
    found = outline(dense_directory(tmp_path / "m"))
    model = Estimate(found, MACHINE, "auto", "auto", "auto", 64, False)
    dense = sum(
        w.nbytes for n, w in found.weights.items() if "norm" not in n and n != "embed.weight"
    )
    norms = sum(w.nbytes for n, w in found.weights.items() if "norm" in n)
    wanted = dense / (DENSE_SHARE * 4e10) + norms / (READ_SHARE * 4e10)
    wanted += 2 * LAYER_SECONDS + len(model.steps) * OP_SECONDS
    assert model.step_seconds(0, 1) == pytest.approx(wanted, rel=1e-12)


def test_windows_bound_what_a_step_reads() -> None:
    from families import family_of

    from qkernels.loading import Checkpoint
    from qkernels.models import family_of_hf

    raw = {
        "model_type": "mistral", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 100,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    config = family_of_hf("mistral").from_hf(raw)
    family = family_of(config)
    weights: dict[str, Any] = {
        d.name: torch.empty(d.shape, device="meta") for d in family.weights(config)
    }
    found = Checkpoint(family, config, weights, "nowhere")
    model = Estimate(found, MACHINE, "float", "auto", "float16", 512, False)
    assert model.kv_read(50) == 50 * model.kv_token
    assert model.kv_read(400) == 100 * model.kv_token


def test_prefill_takes_time_with_its_length(tiny: Path) -> None:
    found = [plan(tiny, MACHINE, context=4096, prompt=n).speed for n in (1, 100, 2000)]
    seconds = [s.first_token for s in found]
    assert all(s is not None for s in seconds) and seconds == sorted(seconds)  # type: ignore[type-var]
    assert found[2].prefill == pytest.approx(2000 / seconds[2])  # type: ignore[operator]


def test_nothing_is_said_of_prefill_where_nothing_was_measured(tiny: Path) -> None:
    gpu = named_gpu("h200")
    assert gpu is not None
    found = plan(tiny, gpu, context=1024)
    assert (found.speed.prefill, found.speed.first_token) == (None, None)
    assert (found.act, found.kv_dtype) == ("float", "bfloat16")
    assert found.speed.decode > 0


# Errors, and machines


def test_errors_are_those_of_loading(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    (cut := tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"llama", b"mamba"))
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = dense_directory(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    for path, kind in (
        (cut, CheckpointError),
        (other, UnsupportedModelError),
        (empty, ValueError),
        (broken, CheckpointError),
        (tmp_path / "none.gguf", FileNotFoundError),
    ):
        with pytest.raises(kind) as ours:
            plan(path, MACHINE)
        with pytest.raises(kind) as theirs:
            QuantDecoder.from_pretrained(path, device="cpu")
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 33}, "1 to 32"),
        ({"batch": True}, "batch"),
        ({"prompt": 0}, "prompt"),
        ({"context": 100, "prompt": 100}, "1 to 99"),
        ({"context": 5000}, "4096"),
        ({"kv_dtype": "int3"}, "kv_dtype"),
        ({"act": "int4"}, "act"),
        ({"spec": "W4A16"}, "quantized already"),
        ({"group_size": 32}, "group_size"),
    ],
)
def test_bad_arguments(asked: dict[str, Any], said: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=said):
        plan(tiny, MACHINE, **asked)


def test_machines_by_name() -> None:
    assert machine_of("rtx 4090").read == GPUS["RTX-4090"].read * 1e9
    assert machine_of("H200", memory=10, read=5.0) == replace(
        machine_of("h200"), memory=10, read=5.0
    )
    with pytest.raises(ValueError, match="H200"):
        machine_of("H2000")
    assert all(g.sheet and 0 < g.memory < 1000 and 0 < g.read < 10_000 for g in GPUS.values())


def test_memory_of_this_machine(tmp_path: Path) -> None:
    here = available()
    assert 0 < here < 2**50
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    with pytest.raises(OSError, match="--memory"):
        available(tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000000 kB\n")
    free = available(tmp_path)
    assert free > 4_096_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available(tmp_path) == pytest.approx(free, rel=0.1)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert available(tmp_path) == 1_000_000


def test_read_rate_is_a_median_of_passes() -> None:
    rate = read_rate(0.0, torch.from_numpy(np.ones(1 << 18, np.int64)))
    assert 1e6 < rate < 1e13


def test_the_example_of_the_document_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/planning.md").read_text()
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    exec(compile(code, "docs/planning.md", "exec"), {"path": tiny})
    assert capsys.readouterr().out.startswith("True ")


# The command


@pytest.fixture
def command() -> Any:
    pytest.importorskip("typer", reason="the command line needs the extra [cli]")
    from typer.testing import CliRunner

    from qkernels.cli.app import app

    def run(*words: Any) -> Any:
        return CliRunner().invoke(app, ["plan", *(str(w) for w in words)])

    return run


def test_the_command_tells_a_plan_as_json(command: Any, tiny: Path) -> None:
    words = (
        "--bandwidth",
        40,
        "--memory",
        "1024 GiB",
        "--context",
        512,
        "--json",
        "--device",
        "cpu",
    )
    result = command(tiny, *words)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["fits"] and said["context"] == 512
    assert said["machine"]["memory"] == 2**40 and said["machine"]["read"] == 40e9
    assert said["memory"]["weights"] == outline(tiny).weights["embed.weight"].nbytes + sum(
        t["nbytes"] for t in said["tensors"] if t["name"] != "embed.weight"
    )


def test_the_command_tells_a_plan_as_text(command: Any, tiny: Path) -> None:
    result = command(tiny, "--device", "L4", "--context", 512)
    assert result.exit_code == 0, result.output
    for part in ("It fits.", "layers.*.q.weight", "L4 has", "24.00 GB", "predicted"):
        assert part in result.stdout
    result = command(tiny, "--device", "L4", "--context", 4096, "--batch", 32, "--memory", "510MB")
    assert "It does not fit." in result.stdout and "--batch" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere.gguf",), "no such file"),
        (("MODEL", "--memory", "lots"), "expected an amount"),
        (("MODEL", "--memory", "-3GB"), "expected an amount"),
        (("MODEL", "--device", "abacus"), "H200"),
        (("MODEL", "--device", "L4", "--batch", "99"), "1 to 32"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: tuple[str, ...], said: str, command: Any, tiny: Path
) -> None:
    result = command(*(tiny if w == "MODEL" else w for w in words))
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("qkernels: ") and said in line


def test_plans_are_plain_values(tiny: Path) -> None:
    found = plan(tiny, MACHINE)
    assert isinstance(found, Plan)
    assert json.loads(json.dumps(found.to_dict()))["memory"]["peak"] == found.memory.peak
