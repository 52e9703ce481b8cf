"""`qkernels quantize`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput, bad_input
from .output import Answer, bar, note, warn
from .source import model_path


@dataclass(frozen=True)
class QuantizeOptions:
    model: str
    out: Path
    spec: str = "W4A16"
    group_size: int | None = None
    algo: str = "auto"
    embeddings: str | None = None
    skip: tuple[str, ...] = ()
    overwrite: bool = False
    max_shard_size: str = "5GB"
    threads: int | None = None


def run(options: QuantizeOptions) -> None:
    path = model_path(options.model)  # before importing torch: a mistyped path is answered at once
    taken = options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir()))
    if taken and not options.overwrite:
        raise BadInput(f"{options.out}: exists already (--overwrite replaces it)")
    with bar(f"quantizing {path.name}") as progress, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        import torch

        from qkernels._format import amount
        from qkernels.quantize_directory import quantize_directory

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with bad_input(ValueError, TypeError, ImportError, OSError):
            report = quantize_directory(
                path,
                options.out,
                options.spec,
                group_size=options.group_size,
                algo=options.algo,
                embeddings=options.embeddings,
                skip=options.skip,
                overwrite=options.overwrite,
                max_shard_size=options.max_shard_size,
                progress=progress,
            )
    for text in dict.fromkeys(str(w.message) for w in said if w.category is not DeprecationWarning):
        warn(text)
    if options.embeddings is not None:
        note("packed embeddings are read by qkernels, not by transformers")
    answer = Answer()
    answer.write(f"{report.layers}\n")
    answer.end()
    quantizing, writing = report.seconds
    note(
        f"{options.out}: {amount(report.nbytes_before)} of safetensors became "
        f"{amount(report.nbytes)}; quantizing {quantizing:.1f} s, writing {writing:.1f} s"
    )
