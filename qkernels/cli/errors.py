"""Errors that the command line turns into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2."""


@contextmanager
def bad_input(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turns exceptions of these kinds into BadInput, with `prefix` before their messages."""
    try:
        yield
    except kinds as error:
        raise BadInput(prefix + describe(error)) from error


def describe(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if (
        isinstance(error, KeyError) and len(error.args) == 1
    ):  # str() of a KeyError is the repr of its message
        text = str(error.args[0])
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__
