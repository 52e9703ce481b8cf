"""Progress of a long conversion: a callable, or a bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Report = Callable[[int, int, str], Any]


@contextlib.contextmanager
def reporting(progress: Report | bool | None, title: str) -> Iterator[Report]:
    """Gives what to call after each layer, with the weights done, their number, and the layer.

    progress: a callable is called; True and None show a bar, on a terminal only; False nothing.
    """
    if callable(progress):
        yield progress
    elif progress is False or not sys.stderr.isatty():
        yield lambda done, total, what: None
    else:
        with _bar(title) as report:
            yield report


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Report]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _plain(title)
        print(file=sys.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=f"{title} {what}"
        )


def _plain(title: str) -> Report:
    def report(done: int, total: int, what: str) -> None:
        text = f"{title} {100 * done // max(total, 1):3d}% {what}"
        print(f"\r{text[:78]:<78}", end="", file=sys.stderr, flush=True)

    return report
