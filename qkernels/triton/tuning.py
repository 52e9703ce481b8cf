"""Shapes of tiles: one small table, and a search for better ones that has to be asked for.

With QKERNELS_TRITON_AUTOTUNE=1 the first call of each kind compiles and times every candidate, up
to a hundred, and keeps the fastest, for good, in a file that is named by GPU and version, in
QKERNELS_CACHE (~/.cache/qkernels unless that or XDG_CACHE_HOME says otherwise). Without it nothing
is searched, but what such a file has is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import interpreted, version


class GemvConfig(NamedTuple):
    """units: of 16 columns, at a time."""

    units: int
    warps: int
    stages: int


class TileConfig(NamedTuple):
    """row_blocks: of 64 rows; tokens: of a tile, 16 or more; units: of 16 columns, at most so many
    of one group in a step."""

    row_blocks: int
    tokens: int
    units: int
    warps: int
    stages: int


Config = GemvConfig | TileConfig


class Key(NamedTuple):
    """What is tuned: a kernel, and what its best shape depends on."""

    kernel: str  # "gemv" or "tile"
    bits: int
    weight: str  # the kind of its groups
    dtype: torch.dtype  # of activations
    m: int
    n: int
    k: int

    def name(self) -> str:
        type_ = str(self.dtype).removeprefix("torch.")
        shape = f"M={bucket(self.m)} {self.n}x{self.k}"
        return f"{self.kernel} W{self.bits} {self.weight} {type_} {shape}"


def bucket(m: int) -> int:
    """Numbers of tokens that share a shape: the next power of two, 4 to 128."""
    return min(128, max(4, 1 << (m - 1).bit_length()))


# By class of GPU, tiles by bucket of M too. gfx9 is AMD's MI200 and MI300 (waves of 64), gfx11 RDNA
# (waves of 32).
_GEMV = {
    "sm80": GemvConfig(16, 4, 3),
    "sm90": GemvConfig(16, 4, 3),
    "sm100": GemvConfig(16, 4, 3),
    "gfx9": GemvConfig(16, 4, 2),
    "gfx11": GemvConfig(8, 4, 2),
    "interpreter": GemvConfig(4, 4, 1),
}
_TILE = {
    # 16 tokens are bound by memory: more stages; 128 by the products: larger tiles.
    ("sm80", 16): TileConfig(1, 16, 8, 4, 4),
    ("sm80", 32): TileConfig(1, 32, 8, 4, 4),
    ("sm80", 64): TileConfig(2, 64, 4, 4, 3),
    ("sm80", 128): TileConfig(2, 64, 4, 4, 3),
    ("sm90", 16): TileConfig(1, 16, 8, 4, 5),
    ("sm90", 32): TileConfig(1, 32, 8, 4, 4),
    ("sm90", 64): TileConfig(2, 64, 4, 8, 4),
    ("sm90", 128): TileConfig(2, 128, 4, 8, 3),
    ("sm100", 16): TileConfig(1, 16, 8, 4, 5),
    ("sm100", 32): TileConfig(1, 32, 8, 4, 4),
    ("sm100", 64): TileConfig(2, 64, 4, 8, 4),
    ("sm100", 128): TileConfig(2, 128, 4, 8, 3),
    ("gfx9", 16): TileConfig(1, 16, 8, 4, 2),
    ("gfx9", 32): TileConfig(1, 32, 8, 4, 2),
    ("gfx9", 64): TileConfig(2, 64, 4, 4, 2),
    ("gfx9", 128): TileConfig(2, 128, 4, 8, 2),
    ("gfx11", 16): TileConfig(1, 16, 4, 4, 2),
    ("gfx11", 32): TileConfig(1, 32, 4, 4, 2),
    ("gfx11", 64): TileConfig(2, 64, 4, 8, 2),
    ("gfx11", 128): TileConfig(2, 64, 4, 8, 2),
    ("interpreter", 16): TileConfig(1, 16, 8, 4, 1),
    ("interpreter", 32): TileConfig(2, 32, 4, 4, 1),
    ("interpreter", 64): TileConfig(2, 64, 8, 4, 1),
    ("interpreter", 128): TileConfig(4, 128, 2, 4, 1),
}


def candidates(key: Key) -> list[Config]:
    """What a search tries; the table's own among them."""
    if key.kernel == "gemv":
        return [GemvConfig(u, w, s) for u in (4, 8, 16) for w in (2, 4, 8) for s in (2, 3, 4)]
    tokens = sorted({16, min(64, max(16, bucket(key.m))), max(16, bucket(key.m))})
    return [
        TileConfig(b, t, u, w, s)
        for b in (1, 2, 4)
        for t in tokens
        for u in (4, 8)
        for w in (4, 8)
        for s in (2, 3, 4)
        if b * t <= 4 * w * 16
    ]


@functools.cache
def class_of(device: torch.device) -> str:
    """The row of the tables for a GPU."""
    if interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx9" if name.startswith("gfx9") else "gfx11"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm80" if major <= 8 else "sm90" if major == 9 else "sm100"


def of_table(key: Key, kind: str) -> Config:
    """The shape for a class of GPUs. Codes of more than 4 bits take twice the registers: half the
    columns at a time."""
    if key.kernel == "gemv":
        config = _GEMV[kind]
        return config._replace(units=max(4, config.units // 2)) if key.bits > 4 else config
    tokens = max(16, bucket(key.m))
    if kind == "sm100" and key.dtype == torch.int8:
        tokens = min(64, tokens)  # integer sums of a group beside those of all: more would spill
    return _TILE[kind, tokens]


_lock = threading.Lock()
_found: dict[str, dict[str, Config]] = {}  # by file, by name of the key
_chosen: dict[
    tuple[Key, torch.device, bool], Config
] = {}  # what calls have got, with a search or not


def folder() -> Path:
    if found := os.environ.get("QKERNELS_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qkernels"


@functools.cache
def _file_name(device: torch.device) -> str:
    gpu = "interpreter" if interpreted() else torch.cuda.get_device_name(device)
    return re.sub(r"[^\w.-]+", "-", f"triton-{version()}-{gpu}") + ".json"


def cache_file(device: torch.device) -> Path:
    """Where shapes found on this GPU are kept."""
    return folder() / _file_name(device)


def _config(numbers: list[int]) -> Config:
    """Raises ValueError for what is no shape."""
    kinds: dict[int, type[GemvConfig] | type[TileConfig]] = {3: GemvConfig, 5: TileConfig}
    if len(numbers) not in kinds or any(n < 1 or n & (n - 1) for n in numbers[:-1]):
        raise ValueError(f"{numbers} is no shape")
    found = kinds[len(numbers)](*map(int, numbers))
    if found.stages < 1 or (isinstance(found, TileConfig) and found.tokens < 16):
        raise ValueError(f"{numbers} is no shape")
    return found


def _read(path: Path) -> dict[str, Config]:
    """What a file has; one that cannot be read is told of and left alone."""
    try:
        if not path.exists():
            return {}
        stored = json.loads(path.read_text())
        return {name: _config(numbers) for name, numbers in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"qkernels: {path} is no file of tile shapes ({error}); delete it, or tune again with "
            "QKERNELS_TRITON_AUTOTUNE=1",
            stacklevel=2,
        )
        return {}


def _keep(path: Path, name: str, config: Config) -> None:
    """Adds a shape to a file, beside what others have found; nobody reads a half-written one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = {**_read(path), name: config}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(shapes, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"qkernels: a tile shape was found and cannot be kept: {error}", stacklevel=2)


def searching() -> bool:
    return os.environ.get("QKERNELS_TRITON_AUTOTUNE", "") == "1"


def choose(key: Key, device: torch.device, run: Callable[[Config], None]) -> Config:
    """The shape for a call. run(config) makes the call, for a search to time; while a graph is
    captured nothing can be timed."""
    search = searching() and not _capturing()
    if (chosen := _chosen.get((key, device, search))) is not None:
        return chosen
    path, name = cache_file(device), key.name()
    with _lock:
        shapes = _found.get(str(path))
        if shapes is None:
            shapes = _found[str(path)] = _read(path)
        found = shapes.get(name)
        if found is None and search:
            found = shapes[name] = _fastest(key, device, run)
            _keep(path, name, found)
    found = found or of_table(key, class_of(device))
    _chosen[key, device, search] = found
    return found


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fastest(key: Key, device: torch.device, run: Callable[[Config], None]) -> Config:
    first, least = of_table(key, class_of(device)), float("inf")
    best = first
    for config in dict.fromkeys([first, *candidates(key)]):
        try:
            seconds = time_of(partial(run, config))
        except Exception:  # too much shared memory for this GPU, or more than its compiler takes
            if config == first:
                raise
            continue
        if seconds < least:
            best, least = config, seconds
    return best


def time_of(call: Callable[[], None]) -> float:
    """Milliseconds, with the caches of the GPU flushed before each call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))
