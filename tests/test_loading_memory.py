"""Loading peaks at the packed size plus two blocks of unpacked rows, measured on a file of a
hundred megabytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gguf_writer import write_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from loading_memory import measure, status

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or "RssAnon" not in status("self"),
    reason="this kernel does not tell RssAnon in /proc/PID/status",
)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_peak_while_loading(tmp_path: Path, kind: str) -> None:
    path = write_llama(
        tmp_path / "model.gguf",
        hidden=2048,
        ffn=5632,
        layers=3,
        heads=16,
        kv_heads=4,
        vocab=4096,
        kind=kind,
    )
    found = measure(path)
    size = path.stat().st_size
    assert size > 70e6
    assert found["samples"] > 20
    # The measurement sees the weights at all: they are anonymous memory when all is loaded.
    assert found["settled"] > 0.9 * found["packed"]
    assert found["packed"] < 1.03 * size
    assert found["peak"] <= found["packed"] + 2 * found["block"]
