"""`qkernels info`: what was built, who serves what, and for a model what runs in its layers and
why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .._format import columns, ranges
from .errors import bad_input
from .loading import LoadOptions, load
from .output import Answer


def grouped(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Rows of layers that say the same, as one: (name without its layer's number, the layers, what
    they say).

    rows: (name such as "layers.3.q", what is said of it), in order.
    """
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for name, said in rows:
        match = re.search(r"\.(\d+)\.", name)
        short = name if match is None else name[: match.start()] + ".*." + name[match.end() :]
        layers = found.setdefault((short, said), [])
        if match is not None:
            layers.append(int(match[1]))
    return [(name, ranges(layers), said) for (name, said), layers in found.items()]


def run(options: LoadOptions | None) -> None:
    out = Answer()
    if options is None:
        with bad_input(ImportError):  # the native library is missing, or does not fit this torch
            from qkernels import info
        out.write(f"{info()}\n")
        return
    loaded = load(options)
    from qkernels.info import TABLE_HEAD, ModelInfo, info

    said = info(loaded.decoder)
    assert isinstance(said, ModelInfo)
    layers = grouped((layer.name, layer.said()) for layer in said.layers)
    table = [("weight", "layers", *TABLE_HEAD), *((name, at, *told) for name, at, told in layers)]
    out.write(f"{columns(said.facts)}\n\n{columns(table)}\n")
