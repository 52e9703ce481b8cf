"""What `evaluate.compare` found, as values and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ._format import columns
from .model_size import ModelSize


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of a reference, over the same positions.

    kl_mean, kl_p99, kl_max: of KL(p_reference || p_model) per position, in nats; kl_error: standard
    error of the mean. top1: share of positions where both think the same token likeliest (of equal
    logits, the lowest id); top1_error: its standard error. ratio: of the perplexities, model /
    reference; ratio_error: its standard error, from the differences of each token's likelihoods
    (paired: most of what makes a text easy or hard is common to both). All errors take positions as
    independent.
    """

    kl_mean: float
    kl_error: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_error: float
    ratio: float
    ratio_error: float


@dataclass(frozen=True)
class Row:
    """One model of a `Report`. divergence: None of the reference, and where there is none. size:
    None of what is no nn.Module."""

    name: str
    perplexity: float
    window_nats: tuple[float, ...]
    divergence: Divergence | None
    size: ModelSize | None


@dataclass(frozen=True)
class Report:
    """Result of `compare`. `str()` is a table, `to_dict()` fit for JSON.

    rows: the reference first, if there is one.
    """

    rows: tuple[Row, ...]
    window: int
    windows: int
    predictions: int

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = []
        for row in self.rows:
            fields = asdict(row) | {"window_nats": list(row.window_nats)}
            size = fields.pop("size")
            fields |= fields.pop("divergence") or {}
            if row.size is not None:
                fields |= {**size, "bits": row.size.bits, "linear_bits": row.size.linear_bits}
            rows.append(fields)
        shape = {"window": self.window, "windows": self.windows, "predictions": self.predictions}
        return {**shape, "rows": rows}

    def __str__(self) -> str:
        # No spaces inside cells: awk and pandas read this as it is.
        compared = any(row.divergence is not None for row in self.rows)
        sized = any(row.size is not None for row in self.rows)
        head = ["model", "perplexity"]
        if compared:
            head += ["ratio", "+-", "kl_mean", "kl_p99", "kl_max", "top1_%"]
        if sized:
            head += ["linear_bits", "bits", "MB"]
        return columns([head, *(self._cells(row, compared, sized) for row in self.rows)])

    def _cells(self, row: Row, compared: bool, sized: bool) -> list[str]:
        cells = ["_".join(row.name.split()), f"{row.perplexity:.4f}"]
        if compared:
            d = row.divergence
            cells += (
                ["-"] * 6
                if d is None
                else [
                    f"{d.ratio:.5f}",
                    f"{d.ratio_error:.5f}",
                    *(f"{kl:.3g}" for kl in (d.kl_mean, d.kl_p99, d.kl_max)),
                    f"{100 * d.top1:.2f}",
                ]
            )
        if sized:
            s = row.size
            bits = (None, None) if s is None else (s.linear_bits, s.bits)
            cells += ["-" if b is None else f"{b:.3f}" for b in bits]
            cells.append("-" if s is None else f"{s.nbytes / 1e6:.1f}")
        return cells
