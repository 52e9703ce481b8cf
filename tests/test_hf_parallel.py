"""transformers' tensor parallelism on packed layers: two ranks, started by torchrun, say what one
process says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk

transformers = pytest.importorskip("transformers", reason="its tensor parallelism is tested")
pytest.importorskip("accelerate", reason="transformers places split models with it")
from hf_parallel_worker import generated, load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::qkernels.convert.QuantWarning")
HERE = Path(__file__).resolve().parent
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "initializer_range": 0.2,
}
MINIMA = {"bits": 4, "group_size": 32, "zero": "minimum"}
# name -> (tied to the table, arguments of QKernelsConfig, saved and loaded again first, dtype)
CASES: dict[str, tuple[bool, dict[str, Any], bool, str]] = {
    "on load, a head too": (
        False, {"spec": "W4A16", "modules_to_not_convert": []}, False, "float32",
    ),
    "on load, bfloat16": (True, {"spec": "W8A16", "group_size": -1}, False, "bfloat16"),
    "compressed-tensors": (True, {"spec": "W4A16"}, True, "float32"),
    "packed on disk, with its table": (
        True, {"spec": MINIMA, "embeddings": "W8A16"}, True, "float32",
    ),
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what one process says, what two ranks say), by case."""
    at = tmp_path_factory.mktemp("parallel")
    for tied in (False, True):
        torch.manual_seed(3 + tied)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros, else
                torch.nn.init.normal_(parameter)
        model.save_pretrained(at / f"float-{tied}")
    alone: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for i, (name, (tied, arguments, stored, dtype)) in enumerate(CASES.items()):
        model = load(str(at / f"float-{tied}"), arguments, dtype=getattr(torch, dtype))
        alone[name] = generated(model)
        asked[name] = (str(at / f"float-{tied}"), arguments, dtype)
        if stored:
            model.save_pretrained(at / str(i))
            asked[name] = (str(at / str(i)), None, dtype)
    wide = {"spec": "W4A16", "group_size": 64}
    asked["wide groups"] = (str(at / "float-True"), wide, "float32")
    (at / "cases.json").write_text(json.dumps(asked))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    run += [f"--master-port={free_port()}", str(HERE / "hf_parallel_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [*run, str(at / "cases.json"), str(at / "found.json")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return alone, json.loads((at / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_say_what_one_process_says(case: str, outcome: Any) -> None:
    alone, found = outcome
    assert found[case]["tokens"] == alone[case]
    assert len(set(alone[case])) > 1  # no model that says one thing
    # Rows of q, columns of the MLP's last layer: half of them in each rank.
    assert found[case]["shapes"] == [[32, 64], [64, 96]]


def test_a_split_model_is_not_saved(outcome: Any) -> None:
    for case in CASES:
        assert "split between ranks" in outcome[1][case]["save"]


def test_columns_that_do_not_divide_are_one_error(outcome: Any) -> None:
    message = outcome[1]["wide groups"]["error"]
    assert "self_attn.o_proj has K = 64, over 2 ranks 32 per rank" in message
    assert "no multiple of 64" in message


def split(module: qk.nn.QuantLinear, dimension: int, ranks: int) -> list[torch.Tensor]:
    """The dense parts of a layer that each rank would hold."""
    from qkernels.hf import parallel

    parts = []
    for rank in range(ranks):
        there = qk.nn.QuantLinear(module.packed)
        parallel._split(there, dimension, rank, ranks)
        parts.append(parallel.local_part(there, module.packed).dequantize())
    return parts


@pytest.mark.parametrize(
    "spec",
    [
        qk.QuantSpec(4, 32),
        qk.QuantSpec(3, 16, zero="integer"),
        qk.QuantSpec(8, -1),
        qk.QuantSpec(6, 16, "int8"),
        qk.QuantSpec(4, 32, "uint4", "minimum"),
    ],
    ids=str,
)
def test_parts_of_a_weight_are_the_weight(spec: qk.QuantSpec) -> None:
    """Rows that fall on blocks of 64 and others, columns on groups; bit for bit."""
    from qkernels.quant.quantize import quantize_packed

    weight = torch.randn(250, 768, generator=torch.Generator().manual_seed(1))
    layer = qk.nn.QuantLinear(quantize_packed(weight, spec))
    whole = layer.packed.dequantize()
    for ranks in (2, 3):
        assert torch.equal(torch.cat(split(layer, 0, ranks)), whole)
    assert torch.equal(torch.cat(split(layer, 1, 3), 1), whole)


def test_what_cannot_be_split() -> None:
    from qkernels.hf.parallel import PackedStyle, _split
    from qkernels.quant.quantize import quantize_packed

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(96) % 3).int()
    order = qk.nn.QuantLinear(
        quantize_packed(weight, qk.QuantSpec(4, 32, act_order=True), g_idx=g_idx)
    )
    with pytest.raises(ValueError, match=r"act-order.* K = 96 cannot be split over 2 ranks"):
        _split(order, 1, 0, 2)
    plain = qk.nn.QuantLinear(quantize_packed(weight, qk.QuantSpec(4, 32)))
    with pytest.raises(ValueError, match=r"K = 96, over 2 ranks 48 per rank.*multiple of 32"):
        _split(plain, 1, 0, 2)
    with pytest.raises(ValueError, match="N = 64, of which the last of 65 ranks would have none"):
        _split(plain, 0, 0, 65)
    with pytest.raises(ValueError, match=r"style 'packed_colwise' .*not known.*colwise, "):
        PackedStyle("packed_colwise").install_forward(plain, None)
