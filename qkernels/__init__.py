"""Quantized kernels for PyTorch: weights at 2 to 8 bits, and a decoder that runs on them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the `qkernels` command (or `python -m qkernels...`, where argv[0] is
    "-m" by now).
    """
    name = Path(getattr(sys, "argv", [""])[0]).name
    return name in ("qkernels", "qkernels.exe", "-m")


# Importing qkernels loads the native library, so that torch.ops.qkernels is there. The one
# exception is the command line, which passes through here on its way to qkernels.cli: importing
# torch first would cost `qkernels --help` two seconds, and a mistyped path as many. There the names
# are loaded when one of them is first asked for.
if TYPE_CHECKING or not _is_command():
    from ._public import *  # noqa: F403
    from ._public import __all__
else:

    def __getattr__(name: str) -> Any:
        # While _public is being imported, the import system asks here for submodules: those are not
        # there yet.
        if not name.startswith("_") and f"{__name__}._public" not in sys.modules:
            public = import_module("._public", __name__)
            globals().update({n: getattr(public, n) for n in public.__all__})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
