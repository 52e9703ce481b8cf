"""How much memory `from_pretrained` with a QKernelsConfig takes beside the packed model.

    python tests/hosts/transformers_memory.py [--layers 6] [--width 1024]

Writes a random bfloat16 model, loads it at W4A16, and compares the peak of anonymous memory (the
mapped files aside) with what is there afterwards. Exits with 1 if the peak is above that by more
than three of the largest weight in float32, which quantizing works in.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers

from qkernels import hf


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    width = arguments.width
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        child = os.fork()  # what it frees must not serve the load
        if not child:
            transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
            os._exit(0)
        os.waitpid(child, 0)
        nbytes = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.002)

        before = anonymous()
        watcher = threading.Thread(target=watch)
        watcher.start()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, quantization_config=hf.QKernelsConfig("W4A16")
        )
        done.set()
        watcher.join()
    packed = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    extra, largest = peak[0] - before - packed, 3 * width * width * 4
    print(f"dense {nbytes / 1e6:.1f} MB, packed {packed / 1e6:.1f} MB")
    print(f"peak {(peak[0] - before) / 1e6:.1f} MB: packed and {extra / 1e6:.1f} MB more")
    print(f"the largest weight in float32: {largest / 1e6:.1f} MB")
    return 0 if extra <= 3 * largest else 1


if __name__ == "__main__":
    sys.exit(main())
