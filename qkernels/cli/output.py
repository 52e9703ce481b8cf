"""What goes where: the model's text to stdout and nothing else; everything about it to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# A model's text, and a file's metadata, must not steer the terminal: C0 (except tab and newline),
# DEL and C1 controls are shown as U+FFFD there. A pipe gets the text as it is.
_CONTROLS = {c: "\ufffd" for c in [*range(0x20), *range(0x7F, 0xA0)] if c not in (0x09, 0x0A)}


def status() -> Console:
    """A console on the current stderr; without colours when that is not a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    return text.translate(_CONTROLS)


def note(text: str) -> None:
    status().print(printable(text), style="dim", markup=False)


def warn(text: str) -> None:
    status().print(printable(text), style="yellow", markup=False)


def fail(text: str) -> None:
    status().print(f"qkernels: {printable(text)}", style="bold red", markup=False)


class Answer:
    """Writes pieces of text to stdout, each flushed, and ends with exactly one newline if anything
    was written.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._terminal = self._out.isatty()
        self._last = "\n"
        if hasattr(
            self._out, "reconfigure"
        ):  # a locale without the character must not end the answer
            self._out.reconfigure(errors="replace")

    def write(self, piece: str) -> None:
        if piece:
            self._out.write(printable(piece) if self._terminal else piece)
            self._out.flush()
            self._last = piece[-1]

    def end(self) -> None:
        if self._last != "\n":
            self._out.write("\n")
            self._out.flush()
            self._last = "\n"


def drop_stdout() -> None:
    """After EPIPE: lets the interpreter's last flush of stdout succeed instead of complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Bar:
    """A progress bar on a terminal's stderr; silent elsewhere, where it would fill a log."""

    def __init__(self, progress: Progress, task: object) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total)  # type: ignore[arg-type]
        if what is not None:
            self._progress.update(self._task, description=printable(what))  # type: ignore[arg-type]


@contextmanager
def bar(description: str) -> Iterator[Bar]:
    console = status()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # rich would write what others print to stdout to stderr
    ) as progress:
        yield Bar(progress, progress.add_task(description, total=None))
