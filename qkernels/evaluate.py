"""Perplexity of a decoder on a text, in independent windows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

# Rows of logits normalized at a time. A block of 64 rows x 49,152 entries is 12.6 MB of float32,
# against 100 MB for the log-softmax of a whole window.
_ROWS = 64


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    value: exp of the mean negative log-likelihood. nats: that mean, in nats per predicted token.
    window_nats: the mean of each window, in order. predictions: predicted tokens in all windows
    together.
    """

    value: float
    nats: float
    window_nats: tuple[float, ...]
    window: int
    predictions: int

    def __float__(self) -> float:
        return self.value


def join_lines(text: str) -> str:
    """Replaces every single newline by a space; runs of two or more (paragraph breaks) stay."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _skipped(length: int, fraction: float) -> int:
    # Through the decimal that was written: int(length * 0.1) can be one less than length // 10.
    return int(Fraction(str(fraction)) * length)


def begins_with_bos(text: Any) -> bool:
    """Whether a tokenizer (`qkernels.text.Text`) puts its BOS in front of a plain text."""
    if text.bos_id is None:
        return False
    ids, plain = text.encode("a", special=True), text.encode("a", special=False)
    return ids[:1] == [text.bos_id] and plain[:1] != [text.bos_id]


def _bos(decoder: Any, bos: bool | None) -> int | None:
    """The token that every window starts with, None if windows start with text."""
    try:
        text = decoder.text
        if bos is None:
            bos = begins_with_bos(text)
        token: int | None = text.bos_id if bos else None
    except (AttributeError, LookupError):  # ids only: no tokenizer says what a sequence begins with
        token, bos = None, bool(bos)
    if bos and token is None:
        raise ValueError("perplexity: bos=True, but the model's tokenizer names no BOS token")
    return token


def _token_ids(
    decoder: Any,
    text_or_ids: str | Sequence[int] | torch.Tensor,
    fraction: float,
    bos: int | None,
) -> torch.Tensor:
    """The ids to evaluate, [T] int64, after the skipped beginning and without `bos` in front."""
    if isinstance(text_or_ids, str):
        text = join_lines(text_or_ids)
        text = text[_skipped(len(text), fraction) :]
        return torch.tensor(decoder.text.encode(text, special=False), dtype=torch.int64)
    if isinstance(text_or_ids, torch.Tensor):
        ids = text_or_ids
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"perplexity: token ids must be int64 or int32, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"perplexity: token ids must have shape [T], got {list(ids.shape)}")
        ids = ids.to("cpu", torch.int64)
    else:
        ids = torch.tensor(list(text_or_ids), dtype=torch.int64)
    if bos is not None and ids[:1].tolist() == [bos]:
        ids = ids[1:]
    return ids[_skipped(ids.numel(), fraction) :]


def window_nats(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum of -log p(ids[t + 1] | logits[t]) over t, in nats.

    logits: [T, vocab], any float dtype; ids: [T] int64. Log-softmax in float32, the sum in float64.
    """
    total = 0.0
    targets = ids[1:].to(logits.device)
    for start in range(0, targets.numel(), _ROWS):
        target = targets[start : start + _ROWS]
        rows = logits[start : start + target.numel()].float()
        picked = torch.log_softmax(rows, dim=-1).gather(1, target[:, None])
        total -= picked.double().sum().item()
    return total


def perplexity(
    decoder: Any,
    text_or_ids: str | Sequence[int] | torch.Tensor,
    *,
    window: int = 512,
    windows: int = 8,
    skip_fraction: float = 0.1,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `decoder` on the first `windows` independent windows of `window` tokens of a
    text.

    text_or_ids: a text, or token ids [T]. Of a text, single newlines are joined with a space, then
    the first
        `skip_fraction` of the characters is dropped (front matter), and the rest is tokenized
        without special tokens. Of ids, the first `skip_fraction` of the ids is dropped.
    window: tokens per window, at least 2; each window starts with an empty context and gives window
        - 1 predictions.
    bos: whether every window starts with the model's BOS, which is then one of its `window` tokens
        and is not predicted. None: as the model's tokenizer does for a plain text (Gemma's does,
        SmolLM2's does not). A BOS in front of given ids is then not taken for text.
    progress: called as progress(windows done, windows) after every window.

    Raises ValueError if the text is too short, or an argument is out of range, and RuntimeError if
    logits are not finite.
    """
    if window < 2:
        raise ValueError(f"perplexity: window must be at least 2 tokens, got {window}")
    if windows < 1:
        raise ValueError(f"perplexity: windows must be at least 1, got {windows}")
    if not 0.0 <= skip_fraction < 1.0:
        raise ValueError(f"perplexity: skip_fraction must be in [0, 1), got {skip_fraction}")
    limit = getattr(decoder, "max_seq_len", None)
    if isinstance(limit, int) and window > limit:
        raise ValueError(
            f"perplexity: a window of {window} tokens exceeds the decoder's context "
            f"of {limit} tokens"
        )

    first = _bos(decoder, bos)
    ids = _token_ids(decoder, text_or_ids, skip_fraction, first)
    fresh = window - (first is not None)  # tokens of text in a window
    needed = fresh * windows
    if ids.numel() < needed:
        raise ValueError(
            f"perplexity: {windows} windows of {window} tokens need {needed} tokens, "
            f"but after the skipped beginning there are {ids.numel()}"
        )

    parts = ids[:needed].view(windows, fresh)
    if first is not None:
        parts = torch.cat([parts.new_full((windows, 1), first), parts], dim=1)
    means: list[float] = []
    for index, part in enumerate(parts):
        logits = decoder(part[None, :]).logits[0]
        nats = window_nats(logits, part)
        if not math.isfinite(nats):
            raise RuntimeError(
                f"perplexity: the logits of window {index} give {nats}; they are not finite"
            )
        means.append(nats / (window - 1))
        if progress is not None:
            progress(index + 1, windows)
    mean = math.fsum(means) / windows
    return Perplexity(math.exp(mean), mean, tuple(means), window, windows * (window - 1))
