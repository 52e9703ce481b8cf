"""Loading a quantized checkpoint peaks at the packed size plus three blocks of unpacked rows, and
quantizing a directory at the quantized size plus one layer."""

from __future__ import annotations

import subprocess
import sys
import threading
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
    write,
)

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from loading_memory import measure, status  # noqa: E402

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or "RssAnon" not in status("self"),
    reason="this kernel does not tell RssAnon in /proc/PID/status",
)


def big_model() -> Any:
    """100 million weights in 14 matrices, float16."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).half()


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_peak_while_loading(format: str, tmp_path: Path) -> None:
    model, generator = big_model(), torch.Generator().manual_seed(0)
    config: dict[str, Any] = {"quant_method": format, "bits": 4, "group_size": 128}
    if format == "compressed-tensors":
        config = ct_config("pack-quantized", group_config(4, group_size=128, symmetric=False))
    tensors = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            continue
        n, k = module.weight.shape
        matrix = Matrix(
            torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
            torch.rand(n, k // 128, generator=generator).half() * 0.01,
            torch.randint(1, 16, (n, k // 128), generator=generator),
            torch.arange(k) // 128,
            4,
        )
        if format == "gptq":
            tensors[path] = gptq_tensors(matrix)
        elif format == "awq":
            tensors[path] = awq_tensors(matrix)
        else:
            tensors[path] = packed_tensors(matrix, symmetric=False)
    write(tmp_path, model, tensors, config)
    found = measure(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert found["samples"] > 20
    assert found["settled"] > 0.9 * found["packed"] > 50e6
    assert found["packed"] < 1.03 * size
    assert found["peak"] <= found["packed"] + 3 * found["block"]


CHILD = """
import sys
import torch, transformers
from transformers import LlamaForCausalLM
import qkernels as qk
torch.randn(64, 64) @ torch.randn(64, 64)
print("go", flush=True)
sys.stdin.readline()
qk.quantize_directory(sys.argv[1], sys.argv[2], algo="rtn", progress=lambda *_: None)
print("done", flush=True)
sys.stdin.readline()
"""


def test_peak_while_quantizing_a_directory(tmp_path: Path) -> None:
    big_model().save_pretrained(tmp_path / "float")
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "float", tmp_path / "out"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "go\n"
    base, peak, said = status(child.pid)["RssAnon"], 0, threading.Event()
    lines: list[str] = []

    def wait(out: Any = child.stdout) -> None:
        lines.append(out.readline())
        said.set()

    threading.Thread(target=wait, daemon=True).start()
    child.stdin.write("\n")
    child.stdin.flush()
    while not said.wait(0.002):
        peak = max(peak, status(child.pid)["RssAnon"] - base)
    assert lines == ["done\n"]
    child.communicate("\n")
    floats = sum(p.stat().st_size for p in (tmp_path / "float").glob("*.safetensors"))
    quantized = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    # Of the largest layer: itself in float32, dequantized, and their difference, for its error.
    layer = 2048 * 5632 * 4 * 3
    assert quantized < 0.35 * floats
    assert quantized < peak <= quantized + layer
