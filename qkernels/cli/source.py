"""MODEL and PROMPT arguments: which file they mean."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from .errors import BadInput


def package_file(package: str, inside: str) -> Path:
    """The file `inside` an installed Python package, found without importing the package."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError) as error:
        raise BadInput(f"model {package}:{inside}: {error}") from error
    if spec is None:
        raise BadInput(f"model {package}:{inside}: no Python package {package!r} is installed here")
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    if not folders:
        raise BadInput(f"model {package}:{inside}: {package} is a module without a folder of files")
    for folder in folders:
        path = folder / inside
        if path.exists():
            return path
    raise BadInput(f"model {package}:{inside}: no such file; looked for {folders[0] / inside}")


def model_path(text: str) -> Path:
    """The path that a MODEL argument means: a path, or PACKAGE:FILE inside an installed Python
    package.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    package, colon, inside = text.partition(":")
    # One letter before the colon is a drive, and "./" or "/" before it a path with a colon in its
    # name.
    if colon and len(package) > 1 and inside and all(p.isidentifier() for p in package.split(".")):
        return package_file(package, inside)
    raise BadInput(
        f"model {text}: no such file or directory "
        "(expected a GGUF file, a directory, or PACKAGE:FILE inside an installed Python package)"
    )


def read_prompt(text: str) -> str:
    """The prompt, or all of stdin for "-" without its final newline."""
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"prompt from stdin: not valid {error.encoding}: {error.reason}"
            ) from error
        text = text.removesuffix("\n")
        if not text:
            raise BadInput("prompt from stdin: expected a text, got nothing")
    if not text:
        raise BadInput("prompt: expected a text, got an empty one")
    return text


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
