"""`qkernels plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .._format import amount, columns
from .errors import BadInput, bad_input
from .loading import LoadOptions
from .output import Answer, bar

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class PlanOptions:
    """load: what would be loaded, and where. memory: as `16GB`; bandwidth: GB/s. The others as
    those of `qkernels.plan.plan`."""

    load: LoadOptions
    batch: int = 1
    prompt: int | None = None
    memory: str | None = None
    bandwidth: float | None = None
    as_json: bool = False


def byte_count(text: str) -> int:
    """`16GB`, `24 GiB` or a number as bytes. Raises BadInput."""
    number = text.strip().rstrip("BbGgMmKkIi ")
    unit = text.strip()[len(number) :].strip().casefold()
    unit = "" if unit == "b" else unit if unit.endswith("b") or not unit else f"{unit}b"
    try:
        found = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        found = 0
    if found <= 0:
        raise BadInput(f"--memory: expected an amount such as 16GB or 24GiB, got {text!r}")
    return found


def run(options: PlanOptions) -> None:
    load = options.load
    path = load.path()
    memory = None if options.memory is None else byte_count(options.memory)
    read = None if options.bandwidth is None else options.bandwidth * 1e9
    with bar("measuring this machine"):
        import torch

        import qkernels._public  # noqa: F401  the libraries, before parts of the package
        from qkernels.machines import machine_of
        from qkernels.plan import plan

        if load.threads is not None:
            torch.set_num_threads(load.threads)
        with bad_input(ValueError, TypeError, RuntimeError, KeyError, ImportError, OSError):
            machine = machine_of(load.device, read=read, memory=memory)
            found = plan(
                path,
                machine,
                context=load.context,
                batch=options.batch,
                prompt=options.prompt,
                spec=load.spec,
                group_size=load.group_size,
                act=load.act,
                kv_dtype=load.kv_dtype,
            )
    answer = Answer()
    answer.write(json.dumps(found.to_dict(), indent=1) if options.as_json else said(found))
    answer.end()


def said(found: Any) -> str:
    """A plan as text."""
    machine, memory, speed = found.machine, found.memory, found.speed
    weights = [("weight", "layers", "format", "tensors", "size")]
    for row in found.tensors:
        weights.append((row.name, row.layers, row.format, str(row.count), amount(row.nbytes)))
    sequences = "1 sequence" if found.batch == 1 else f"{found.batch} sequences"
    parts = [
        ("process, before loading", memory.process),
        ("weights", memory.weights),
        (f"KV cache, {found.kv_dtype}: {sequences} of {found.context} tokens", memory.kv),
        ("rotations, registers and logits", memory.tables + memory.workspace),
        ("tokenizer", memory.text),
        ("kept by allocators", memory.heap),
        ("in all", memory.running),
        ("at most, while loading", memory.while_loading),
        (f"{machine.name} has", machine.memory),
    ]
    verdict = "It fits." if found.fits else "It does not fit."
    longest = (
        "No context fits."
        if not found.max_context
        else f"The longest context that fits is {found.max_context} tokens"
        + (
            ", all that the model was made for."
            if found.max_context == found.model_context
            else "."
        )
    )
    speeds = [
        ("decode, empty context", f"{speed.decode:.1f} tok/s"),
        (f"decode, {found.context} tokens of context", f"{speed.decode_full:.1f} tok/s"),
    ]
    if speed.prefill is not None:
        speeds += [
            (f"prefill of {speed.prompt} tokens", f"{speed.prefill:.0f} tok/s"),
            ("time to the first token", f"{speed.first_token:.2f} s"),
        ]
    reads = (
        f"{amount(machine.read)}/s of memory ({machine.source}); a step reads "
        f"{amount(found.step_weight_bytes)} of weights and {amount(found.kv_token_bytes)} per "
        "token of context"
    )
    if speed.rehearsed:
        reads += "\nSpeeds: the model's own steps, timed here on blank weights of its formats."
    elif machine.kind == "cpu":
        reads += "\nSpeeds: computed from the bandwidth and operations that the machine has."
    blocks = [
        f"{found.source}: {found.family}, activations {found.act}",
        columns(weights),
        columns([(name, amount(count)) for name, count in parts if count]),
        f"{verdict} {longest}",
        *(["Would fit:\n" + "\n".join(f"  {s}" for s in found.suggestions)]
          if found.suggestions else []),
        columns(speeds) + f"\n{reads}",
    ]  # fmt: skip
    if machine.kind == "cuda":
        blocks.append("Speeds on GPUs are predicted: nothing has been measured on one.")
    return "\n\n".join(blocks) + "\n"
