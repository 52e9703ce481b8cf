"""From command-line options to a decoder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput, bad_input
from .output import bar
from .source import model_path


@dataclass(frozen=True)
class LoadOptions:
    """Options that all commands with a MODEL share."""

    model: str
    act: str = "auto"
    kv_dtype: str = "auto"
    threads: int | None = None
    context: int | None = None
    spec: str | None = None
    group_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def path(self) -> Path:
        """Of the model, before torch is imported: what is mistyped is answered at once. Raises
        BadInput."""
        if self.group_size is not None and self.spec is None:
            raise BadInput("--group-size: only together with --spec")
        return model_path(self.model)


@dataclass
class Loaded:
    decoder: Any
    seconds: float


def load(options: LoadOptions) -> Loaded:
    """Loads the model with a progress bar. Raises BadInput for whatever the model, or an option,
    cannot be.
    """
    path = options.path()
    with bar(f"loading {path.name}") as progress:
        # From here on: what a user waits for includes importing torch and this package.
        start = time.perf_counter()
        import torch

        import qkernels as qk

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with bad_input(
            ValueError, TypeError, RuntimeError, KeyError, ImportError, NotImplementedError, OSError
        ):
            spec, act = None, options.act
            if options.spec is not None:
                from qkernels.quant.spec import scheme_act

                spec = qk.QuantSpec.from_scheme(options.spec, options.group_size)
                if act == "auto":  # the A16 of W4A16 asks for float activations, an A8 for int8
                    act = scheme_act(options.spec)
            decoder = qk.QuantDecoder.from_pretrained(
                path,
                spec=spec,
                device=options.device,
                act=act,
                dtype=options.dtype,
                kv_dtype=options.kv_dtype,
                max_seq_len=options.context,
                progress=progress,
            )
        return Loaded(decoder, time.perf_counter() - start)
