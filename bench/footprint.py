"""What a token costs at least, from the checkpoint: bytes to read and operations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# A machine that others share reads faster than it can sustain at times. Above this, a measured
# bandwidth is taken for such a burst, and shares are of this instead.
STEADY_GB_PER_S = 45.0
CHUNK = 512  # tokens of a prompt per pass over the weights, here and in llama.cpp


@dataclass(frozen=True)
class Footprint:
    """weight_bytes: of the tensors that a token reads, as stored. layer_ops, head_ops: operations
    of a token's matrix products, two per weight, without and with the logits."""

    weight_bytes: int
    layer_ops: int
    head_ops: int

    def ops(self, tokens: int, logits: int) -> int:
        return tokens * self.layer_ops + logits * self.head_ops


def footprint(path: Path) -> Footprint:
    """Of a GGUF file. An embedding table counts only where it gives the logits, too: else a token
    reads one row of it. Raises CheckpointError."""
    from qkernels.checkpoints import GGUFFile

    with GGUFFile(path) as file:
        tensors = dict(file.tensors)
    tensors.pop("rope_freqs.weight", None)  # read once, when the angles are computed
    head = "output.weight"
    if head in tensors:
        tensors.pop("token_embd.weight", None)
    else:
        head = "token_embd.weight"
    ops = {n: 2 * prod(info.shape) for n, info in tensors.items() if len(info.shape) == 2}
    head_ops = ops.pop(head, 0)
    nbytes = sum(info.nbytes for info in tensors.values())
    return Footprint(nbytes, sum(ops.values()), head_ops)


def read_ceiling(samples: list[float]) -> dict[str, Any]:
    """Fields of a result: the best of the bandwidths (GB/s) measured in the run, and what shares
    are of."""
    best = max(samples)
    return {
        "read_gb_per_s": round(best, 2),
        "read_ceiling_gb_per_s": round(min(best, STEADY_GB_PER_S), 2),
    }
