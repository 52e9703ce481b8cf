"""`qkernels eval`."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import BadInput, bad_input
from .loading import LoadOptions, load
from .output import Answer, bar, note
from .source import model_path, read_text

REFERENCE = "reference"  # the name of its row, and the word after --against for MODEL itself
ITSELF = "float"


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and how. specs: schemes of a float model, each a row, such as "W8A8:g128".
    against: "float", a model, or None: "float" with specs, nothing without."""

    specs: tuple[str, ...]
    against: str | None
    textfile: Path
    windows: int
    window: int
    skip_fraction: float
    bos: bool | None
    as_json: bool


def run(options: LoadOptions, wanted: EvalOptions) -> None:
    text = read_text(wanted.textfile)  # first: a mistyped file name should not cost a load
    candidates = _candidates(options, wanted.specs)
    reference = _reference(options, wanted)
    start = time.perf_counter()
    truth = None if reference is None else load(reference).decoder
    decoders = {name: load(each).decoder for name, each in candidates.items()}
    loaded = time.perf_counter()
    from qkernels.evaluate import compare

    with bar("evaluating") as progress, bad_input(ValueError):
        report = compare(
            truth,
            decoders,
            text,
            window=wanted.window,
            windows=wanted.windows,
            skip_fraction=wanted.skip_fraction,
            bos=wanted.bos,
            name=REFERENCE,
            progress=progress,
        )
    seconds = time.perf_counter() - loaded
    answer = Answer()
    if wanted.as_json:
        ways = {name: _way(d) for name, d in {REFERENCE: truth, **decoders}.items()}
        result = report.to_dict()
        for row in result["rows"]:
            row |= ways[row["name"]]
        answer.write(f"{json.dumps(result, indent=1)}\n")
    else:
        answer.write(f"{report}\n")
    if reference is not None:
        itself = reference.model == options.model
        what = "the weights of MODEL as they are stored" if itself else reference.model
        note(f"{REFERENCE}: {what}, {_said(truth)}")
    for name, decoder in decoders.items():
        note(f"{name}: {_said(decoder)}")
    spread = "; ".join(
        f"{row.name} {min(row.window_nats):.3f} to {max(row.window_nats):.3f}"
        for row in report.rows
    )
    note(
        f"{wanted.windows} windows of {wanted.window} tokens, {report.predictions} predictions; "
        f"nats per token by window: {spread}"
    )
    tokens = len(report.rows) * wanted.windows * wanted.window
    note(f"load {loaded - start:.2f} s, evaluation {seconds:.2f} s, {tokens / seconds:.0f} tok/s")
    if reference is None:
        note("perplexity alone; --against float compares with float activations and float32 KV")
    else:
        note("ratio: of perplexities, +- its paired standard error; KL in nats per token")


def _candidates(options: LoadOptions, specs: tuple[str, ...]) -> dict[str, LoadOptions]:
    if not specs:
        if options.group_size is not None:
            raise BadInput("--group-size: only together with --spec")
        return {model_path(options.model).name: options}
    candidates: dict[str, LoadOptions] = {}
    for text in specs:
        match = re.fullmatch(r"([^:]+)(?::g(-1|\d+))?", text)
        if match is None:
            raise BadInput(f"--spec: expected a scheme such as W4A16 or W8A8:g128, got {text!r}")
        group = options.group_size if match[2] is None else int(match[2])
        if text in candidates:
            raise BadInput(f"--spec: {text} stands there twice")
        candidates[text] = replace(options, spec=match[1], group_size=group)
    if REFERENCE in candidates:
        raise BadInput(f"--spec: unknown scheme {REFERENCE!r}")
    return candidates


def _reference(options: LoadOptions, wanted: EvalOptions) -> LoadOptions | None:
    against = wanted.against or (ITSELF if wanted.specs else None)
    if against is None:
        return None
    model = options.model if against == ITSELF else against
    exact = replace(options, act="float", dtype="float32", kv_dtype="float32")
    return replace(exact, model=model, spec=None, group_size=None)


def _way(decoder: Any) -> dict[str, str]:
    return {} if decoder is None else {"act": decoder.act, "kv_dtype": decoder.kv_dtype}


def _said(decoder: Any) -> str:
    return f"activations {decoder.act}, KV {decoder.kv_dtype}"
