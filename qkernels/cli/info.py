"""`qkernels info`: what was built, who serves what, and for a model what runs in its layers and
why.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import bad_input
from .loading import LoadOptions, load
from .output import Answer, amount
from .traffic import kv_bytes


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of text in aligned columns; the last one is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        (
            indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def grouped(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Rows of layers that say the same, as one: (name without its layer's number, the layers, what
    they say).

    rows: (name such as "layers.3.attn.q.weight", what is said of it), in order.
    """
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for name, said in rows:
        match = re.search(r"\.(\d+)\.", name)
        short = name if match is None else name[: match.start()] + ".*." + name[match.end() :]
        layers = found.setdefault((short, said), [])
        if match is not None:
            layers.append(int(match[1]))
    return [(name, ranges(layers), said) for (name, said), layers in found.items()]


def _machine() -> list[list[str]]:
    with bad_input(ImportError):  # the native library is missing, or does not fit this torch
        import torch

        import qkernels._public  # noqa: F401  first: it imports the rest in order, and loads the library
        from qkernels import __version__, _library, backends
    isa = torch.ops.qkernels.cpu_isa()
    isas = [name for name in re.split(r"[,\s]+", torch.ops.qkernels.cpu_isas()) if name]
    backend, policy = backends.current()
    rows = [
        [
            "qkernels",
            f"{__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        ],
        [
            "CPU",
            f"{isa} kernels in use; this machine runs {', '.join(isas)}; "
            f"{torch.get_num_threads()} threads",
        ],
        ["CUDA", _library.cuda_status],
        ["backend", f"{backend}; when a kernel is passed over: {policy}"],
    ]
    built = Path(_library.__file__).with_name("build_info.json")
    if built.exists():
        facts = json.loads(built.read_text())
        for name, how in facts.get("built", {}).items():
            targets = ", ".join(how.get("targets", []))
            rows.append(
                [
                    "built",
                    f"{name}: {targets}; {how.get('compiler')}, torch {how.get('headers')}",
                ]
            )
        rows += [["not built", f"{name}: {why}"] for name, why in facts.get("skipped", {}).items()]
    return rows


def _backend_rows() -> list[list[str]]:
    """Per op, each row of the table for this machine and whether it has a kernel here."""
    from qkernels import backends
    from qkernels.ops import registry

    rows = [["op", "rows, first that can serve wins"]]
    for op in sorted(registry._defs):
        if op in ("cpu_isa", "cpu_isas", "set_cpu_isa"):
            continue
        said = []
        for row in backends.rows(op):
            device = row.device or "cpu"
            there = backends._implemented(row, device)
            said.append(row.name + ("" if there else f" (no kernel for {device})"))
        rows.append([op, ", ".join(said)])
    return rows


def _sizes(decoder: Any) -> list[list[str]]:
    config = decoder.config
    windows = ranges({w for w in config.windows if w})
    step = kv_bytes(decoder.kv_dtype, config.kv_heads, config.head_dim, (0,) * config.layers, 1)
    parts = [
        ["source", str(decoder.source)],
        [
            "model",
            f"{config.family}: {config.layers} layers, hidden {config.hidden}, "
            f"FFN {config.ffn} ({config.activation}), "
            f"vocabulary {config.vocab}" + (", tied head" if config.tied else ""),
        ],
        [
            "attention",
            f"{config.q_heads} heads on {config.kv_heads} of keys and values, "
            f"head_dim {config.head_dim}"
            + (f", window {windows}" if windows else "")
            + (", qk-norm" if config.qk_norm else ""),
        ],
        [
            "rope",
            f"theta {config.rope.theta:g}, "
            + (config.rope.scaling.get("rope_type") or "not scaled"),
        ],
        [
            "context",
            f"{decoder.max_seq_len} tokens here; the model was made for {config.max_position}",
        ],
        [
            "weights",
            f"{amount(decoder.nbytes)}; a decode step reads {amount(decoder.weight_bytes)}",
        ],
        [
            "KV cache",
            f"{decoder.kv_dtype}, {amount(step)} per token, "
            f"{amount(step * decoder.max_seq_len)} for a full context",
        ],
        ["activations", decoder.act],
    ]
    because = decoder.composed_because()
    parts.append(
        [
            "runs as",
            "one native call per step" if because is None else f"one op after the other: {because}",
        ]
    )
    return parts


def _layers(decoder: Any) -> list[list[str]]:
    """Per kind of matrix: format, size, who computes it, and why no faster row does."""
    from qkernels import backends
    from qkernels.nn.program import Embed, Linear
    from qkernels.quant import PackedWeight

    weights = decoder._weights()
    said: list[tuple[str, tuple[str, ...]]] = []
    for step in decoder._steps:
        if not isinstance(step, (Embed, Linear)):
            continue
        name, weight = step.weight, weights[step.weight]
        shape = " x ".join(
            str(n)
            for n in ((weight.n, weight.k) if isinstance(weight, PackedWeight) else weight.shape)
        )
        if isinstance(weight, PackedWeight):
            if isinstance(step, Embed):
                op, act = "embedding", "-"
                case: dict[str, Any] = {"weight": weight.kind}
            else:
                group = decoder._act_group(name)
                act = f"int8 g{group}" if group else "float"
                op = "linear_quant" if group else "linear"
                case = {
                    "weight": weight.kind,
                    "act": "int8" if group else "float",
                    "group": weight.group,
                    "act_group": group,
                }
            choice = backends.choose(op, decoder.device.type, case)
            why = "; ".join(f"{row}: {reason}" for row, reason in choice.reasons)
            entry = (op, shape, str(weight.kind), act, choice.row.name, why)
        else:
            op = "embedding" if isinstance(step, Embed) else "linear"
            entry = (op, shape, str(weight.dtype).removeprefix("torch."), "-", "torch", "dense")
        said.append((name, entry))
    rows = [["weight", "layers", "op", "[N x K]", "format", "act", "runs on", "why"]]
    rows += [[name, layers, *entry] for name, layers, entry in grouped(said)]
    return rows


def run(options: LoadOptions | None) -> None:
    out = Answer()
    if options is None:
        out.write(columns(_machine(), "") + "\n\n" + columns(_backend_rows(), "") + "\n")
        return
    loaded = load(options)
    out.write(
        columns(_sizes(loaded.decoder), "") + "\n\n" + columns(_layers(loaded.decoder), "") + "\n"
    )
