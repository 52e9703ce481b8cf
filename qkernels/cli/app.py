"""The commands and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import output
from .errors import BadInput, describe
from .options import (
    LOADING,
    Act,
    ActOption,
    Context,
    Debug,
    DeviceOption,
    GroupSize,
    KvDtype,
    KvOption,
    MaxNewTokens,
    MinP,
    Model,
    Penalty,
    Seed,
    Spec,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    sampling,
)

INTERRUPTED = 130  # 128 + SIGINT
READER_GONE = 141  # 128 + SIGPIPE


class Commands(TyperGroup):
    """Every error becomes one line on stderr and an exit code; a traceback needs --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            output.note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            output.drop_stdout()
            raise typer.Exit(READER_GONE) from None

    def main(  # type: ignore[override]
        self, args: Any = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        code = 0
        try:
            result = super().main(args=words, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
        except Exception as error:
            if "--debug" in words:
                raise
            if hasattr(error, "format_message"):  # typer's: a bad option, a missing argument
                message = " ".join(error.format_message().split())
                if message:  # without arguments the help was printed instead
                    output.fail(f"{message} (see qkernels --help)")
                code = int(getattr(error, "exit_code", 2))
            elif isinstance(error, BadInput):
                output.fail(describe(error))
                code = 2
            else:
                output.fail(f"{type(error).__name__}: {describe(error)} (--debug shows where)")
                code = 1
        if standalone_mode:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run quantized language models with this package's own kernels.",
)


@app.callback()
def common(debug: Debug = False) -> None:
    pass


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help='The text to continue, or "-" for stdin.')
    ],
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw", help="Ask PROMPT through the chat template, or continue it as it is."
        ),
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    stop: Stop = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: DeviceOption = "auto",
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    context: Context = None,
    spec: Spec = None,
    group_size: GroupSize = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt, or answer it with --chat. The text goes to stdout as it is decoded."""
    from .generate import run
    from .loading import LoadOptions

    run(
        LoadOptions(model, act.value, kv_dtype.value, threads, context, spec, group_size, device),
        prompt,
        chat,
        sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, max_new_tokens),
    )


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    stop: Stop = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: DeviceOption = "auto",
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    context: Context = None,
    spec: Spec = None,
    group_size: GroupSize = None,
    debug: Debug = False,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the program; /help lists the commands."""
    from .chat import run
    from .loading import LoadOptions

    run(
        LoadOptions(model, act.value, kv_dtype.value, threads, context, spec, group_size, device),
        system,
        sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, max_new_tokens),
    )


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for generate; optional.")
    ] = None,
    device: DeviceOption = "auto",
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    context: Context = None,
    spec: Spec = None,
    group_size: GroupSize = None,
    debug: Debug = False,
) -> None:
    """Show what was built and which backend serves what; with MODEL, what runs in each of its
    layers and why.
    """
    from .info import run
    from .loading import LoadOptions

    options = None
    if model is not None:
        kv = kv_dtype.value
        options = LoadOptions(model, act.value, kv, threads, context, spec, group_size, device)
    run(options)


@app.command()
def plan(
    model: Model,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu, cuda, cuda:1, auto, or the name of a GPU such as H200."
        ),
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory to plan for, such as 16GB.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", min=0.001, help="Its bandwidth in GB/s; default: measured."),
    ] = None,
    context: Context = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help="Tokens until the first one is timed.")
    ] = None,
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    spec: Spec = None,
    group_size: GroupSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Say whether a model fits and how fast it will be, from its header, before loading it."""
    from .loading import LoadOptions
    from .plan import PlanOptions, run

    kv = kv_dtype.value
    load = LoadOptions(model, act.value, kv, threads, context, spec, group_size, device)
    run(PlanOptions(load, batch, prompt, memory, bandwidth, as_json))


@app.command()
def serve(
    model: Model,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others can reach 0.0.0.0.")
    ] = "localhost",
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model, for clients; default: the file's.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="QKERNELS_API_KEY", help="What clients must send."),
    ] = None,
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    context: Context = None,
    spec: Spec = None,
    group_size: GroupSize = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attn",
            help="An attention implementation of transformers; its layers run then, not ours.",
            rich_help_panel=LOADING,
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers/--no-layers", help="Run decoder layers by our programs."),
    ] = True,
    slots: Annotated[
        int,
        typer.Option(
            "--slots",
            min=0,
            help="Requests computed together, by the scheduler and layers of transformers; 0: one "
            "after the other, on our layers.",
        ),
    ] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show requests.")] = False,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients, through the server of transformers, on this machine only."""
    from .loading import LoadOptions
    from .serve import ServeOptions, run

    load = LoadOptions(model, act.value, kv_dtype.value, threads, context, spec, group_size)
    run(ServeOptions(load, host, port, name, api_key, attention, layers, slots, verbose))


@app.command("eval")
def evaluate(
    model: Model,
    textfile: Annotated[Path, typer.Argument(metavar="TEXTFILE", help="UTF-8 text.")],
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            metavar="SCHEME[:gN]",
            help="Quantize float weights on load, such as W4A16 or W8A8:g128; may be repeated, "
            "each is a row.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with another model, or with this one (float): weights as stored, float "
            "activations, float32 KV. Default: float with --spec, else nothing.",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=1, help="Independent windows to evaluate.")
    ] = 8,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    skip_fraction: Annotated[
        float,
        typer.Option("--skip-fraction", min=0.0, max=0.99, help="Share of the text to skip first."),
    ] = 0.1,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Start windows with BOS; default: as the tokenizer does."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    device: DeviceOption = "auto",
    act: ActOption = Act.auto,
    kv_dtype: KvOption = KvDtype.auto,
    threads: Threads = None,
    group_size: GroupSize = None,
    debug: Debug = False,
) -> None:
    """Perplexity of a model on a text file and, against a float model, KL divergence and how often
    both think the same token likeliest. One row per model; all are in memory at the same time.
    """
    from .evaluate import EvalOptions, run
    from .loading import LoadOptions

    run(
        LoadOptions(model, act.value, kv_dtype.value, threads, None, None, group_size, device),
        EvalOptions(
            tuple(spec or ()), against, textfile, windows, window, skip_fraction, bos, as_json
        ),
    )


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Directory with a float model: config.json and safetensors."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write: compressed-tensors.")
    ],
    spec: Annotated[
        str, typer.Option("--spec", help="Scheme of the linear layers: W2A16 to W8A16, W8A8.")
    ] = "W4A16",
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Columns per scale; default: 32, and a row for W8A8."),
    ] = None,
    algo: Annotated[
        str, typer.Option("--algo", help="How weights are rounded: auto, rtn or hqq.")
    ] = "auto",
    embeddings: Annotated[
        str | None,
        typer.Option("--embeddings", help="Scheme of the tables too; only qkernels reads those."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", help="A module that stays dense, beside lm_head; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of a safetensors file.")
    ] = "5GB",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Quantize a float model of transformers, layer by layer, to a directory that transformers,
    vLLM and this package load.
    """
    from .quantize import QuantizeOptions, run

    run(
        QuantizeOptions(
            model,
            out,
            spec,
            group_size,
            algo,
            embeddings,
            tuple(skip or ()),
            overwrite,
            max_shard_size,
            threads,
        )
    )


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="A look at one model, in about a minute.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every width, group, zero and shape: many hours.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Shapes of SmolLM2-135M (the default of --quick), Gemma-3-270M, Llama-3.2-1B or "
            "Llama-3.1-8B; may be repeated. Default: all.",
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            metavar="REGEX",
            help='Cases whose names have this in them, such as "linear.* W4 g32" (--list shows '
            "the names).",
        ),
    ] = None,
    m: Annotated[
        list[int] | None,
        typer.Option("--m", min=1, help="Rows of activations (tokens); may be repeated."),
    ] = None,
    threads: Threads = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for the results.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="The same as a table.")] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Directory for plots; needs matplotlib."),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show the names of the cases and measure nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure the kernels on this machine, against torch and against what the machine allows. Each
    is compared with the reference first, and a wrong result is an error.
    """
    from .bench import BenchOptions, run

    run(
        BenchOptions(
            quick,
            every,
            tuple(model or ()),
            kernel,
            tuple(m or ()),
            threads,
            json,
            csv,
            plots,
            list_only,
        )
    )
