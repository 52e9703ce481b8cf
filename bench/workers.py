"""Processes that answer requests, a JSON object per line each way.

What is raced lives in processes of its own: engines bring their own thread pools and their own
Python environments. This module and what a worker runs need nothing but the standard library, since
a peer's environment has neither torch nor qkernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended or gave no answer, with the end of what it wrote to stderr."""


def serve(start: Callable[[], tuple[Message, Callable[[Message], Message]]]) -> None:
    """Calls `start`, writes the hello that it returns, then an answer to each request until stdin
    ends."""
    # Whatever a library prints, C code included, must not end up between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    hello, answer = start()
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


class Worker:
    """A process that calls `serve`. hello: its first line. Raises WorkerError when it ends; one
    that does not start leaves no process."""

    def __init__(self, command: Sequence[str]) -> None:
        # A file, not a pipe: llama.cpp logs more than a pipe that nobody reads would hold.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.hello: Message = self._read()
        except BaseException:  # nobody has the worker yet to close it
            self._process.kill()
            self.close()
            raise

    def _read(self) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(f"a worker ended:\n{self._said()}")
        try:
            return json.loads(line)
        except ValueError:
            raise WorkerError(f"a worker answered {line!r}, no JSON:\n{self._said()}") from None

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def ask(self, **request: Any) -> Message:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` finds the end of the output and tells why
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # a request that an ended worker has not read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
