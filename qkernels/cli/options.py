"""The options that commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer


class Act(str, Enum):
    auto = "auto"
    int8 = "int8"
    float = "float"


class KvDtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


LOADING = "Loading"
SAMPLING = "Sampling (defaults: the model's own)"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="GGUF file, model directory, or PACKAGE:FILE for a file in an installed package.",
    ),
]
ActOption = Annotated[
    Act,
    typer.Option(
        "--act",
        help="Activations of the linear layers; auto is int8 on the CPU, float on a GPU.",
        rich_help_panel=LOADING,
    ),
]
KvOption = Annotated[
    KvDtype,
    typer.Option(
        "--kv-dtype", help="Type of the KV cache; auto is a 16-bit float.", rich_help_panel=LOADING
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1; auto is a GPU that can be used, else the CPU.",
        rich_help_panel=LOADING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads; default: torch's choice.", rich_help_panel=LOADING
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=2, help="Tokens of context to reserve.", rich_help_panel=LOADING),
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--spec", help="Quantize float weights on load, such as W4A16.", rich_help_panel=LOADING
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", help="Columns per scale, with --spec.", rich_help_panel=LOADING),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=0, help="Keep the k likeliest; 0: all.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="Keep this probability mass.", rich_help_panel=SAMPLING
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Drop below this share of the likeliest.",
        rich_help_panel=SAMPLING,
    ),
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1 discourages repeats.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Makes sampling repeatable.", rich_help_panel=SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Keyword arguments of `stream`; what was not given is left to the model's defaults."""
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
    }
    return {"max_new_tokens": max_new_tokens} | {k: v for k, v in given.items() if v is not None}
