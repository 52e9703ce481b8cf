"""`qkernels eval`."""

from __future__ import annotations

import time
from pathlib import Path

from .errors import bad_input
from .loading import LoadOptions, load
from .output import Answer, bar, note
from .source import read_text


def run(
    options: LoadOptions, textfile: Path, windows: int, window: int, skip_fraction: float
) -> None:
    text = read_text(textfile)  # first: a mistyped file name should not cost a load
    loaded = load(options)
    from qkernels.evaluate import perplexity

    start = time.perf_counter()
    with bar("perplexity") as progress, bad_input(ValueError):
        result = perplexity(
            loaded.decoder,
            text,
            window=window,
            windows=windows,
            skip_fraction=skip_fraction,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    answer = Answer()
    answer.write(f"{result.value:.4f}\n")
    spread = f"{min(result.window_nats):.3f} to {max(result.window_nats):.3f}"
    note(
        f"perplexity over {windows} windows of {window} tokens, {result.predictions} predictions; "
        f"nats per token {result.nats:.4f} (windows: {spread})"
    )
    note(
        f"load {loaded.seconds:.2f} s, evaluation {seconds:.2f} s, "
        f"{windows * window / seconds:.0f} tok/s"
    )
