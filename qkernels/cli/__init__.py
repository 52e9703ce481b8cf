"""The command line, `qkernels`. This module imports neither typer nor torch: `qkernels --help` has
to be quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line with `argv` (default: the process's arguments) and exits.

    Exit codes: 0; 1 for a failure inside this package; 2 for bad input; 130 after Ctrl-C; 141 when
    the reader of stdout went away.
    """
    try:
        import rich
        import typer
    except ImportError as error:
        print(
            f"qkernels: the command line needs {error.name}. Type\n    pip install 'qkernels[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        from .app import app
    except KeyboardInterrupt:
        sys.exit(130)
    app(args=None if argv is None else list(argv), prog_name="qkernels")
