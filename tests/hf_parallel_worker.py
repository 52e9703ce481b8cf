"""A rank of tests/test_hf_parallel.py: both load models that are split between them, and the first
writes down what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from qkernels import QuantSpec, hf


def generated(model: Any) -> list[int]:
    """Greedy tokens after a fixed prompt."""
    ids = torch.tensor([[5, 17, 31, 44, 9]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def load(directory: str, arguments: dict[str, Any] | None, **kwargs: Any) -> Any:
    """arguments: of QKernelsConfig, None for a model that is quantized on disk."""
    hf.register()
    if arguments is not None:
        if isinstance(arguments["spec"], dict):
            arguments = {**arguments, "spec": QuantSpec.from_dict(arguments["spec"])}
        kwargs["quantization_config"] = hf.QKernelsConfig(**arguments)
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)


def documented(directory: str) -> Any:
    """A model of ours, loaded as docs/transformers.md does."""
    text = (Path(__file__).resolve().parent.parent / "docs/transformers.md").read_text()
    (code,) = (b.split("```")[0] for b in text.split("```python\n# torchrun ")[1:])
    names: dict[str, Any] = {"path": directory}
    exec(compile(f"# {code}", "docs/transformers.md", "exec"), names)
    return names["model"]


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, (directory, arguments, dtype) in cases.items():
        try:
            if arguments is None:
                model = documented(directory)
            else:
                model = load(directory, arguments, dtype=getattr(torch, dtype), tp_plan="auto")
            layer = model.model.layers[0]
            shapes = [
                [layer.self_attn.q_proj.packed.n, layer.self_attn.q_proj.packed.k],
                [layer.mlp.down_proj.packed.n, layer.mlp.down_proj.packed.k],
            ]
            found[name] = {"tokens": generated(model), "shapes": shapes}
            try:
                model.save_pretrained(Path(directory).parent / "never")
            except ValueError as error:
                found[name]["save"] = str(error)
        except ValueError as error:
            found[name] = {"error": str(error)}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
