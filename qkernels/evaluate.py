"""Quality of a model on a text, in independent windows: perplexity, and distance to a reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .eval_report import Divergence, Report, Row
from .model_size import model_size
from .text import Text, text_of_tokenizer

# Entries of logits normalized at a time: 2^21 float32 are 8 MB, and a few such buffers are alive.
# That is 42 rows of a vocabulary of 49,152, and 8 of Gemma's 262,144, whose window of 512 rows is
# 537 MB.
_ENTRIES = 1 << 21

TextOrIds = str | Sequence[int] | torch.Tensor
Progress = Callable[[int, int], None]


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


def begins_with_bos(text: Text) -> bool:
    """Whether a tokenizer puts its BOS in front of a plain text."""
    if text.bos_id is None:
        return False
    ids, plain = text.encode("a", special=True), text.encode("a", special=False)
    return ids[:1] == [text.bos_id] and plain[:1] != [text.bos_id]


@dataclass(frozen=True)
class _Plan:
    """What `perplexity` and `compare` cut a text into. what: the caller, in messages."""

    what: str
    window: int
    windows: int
    skip_fraction: float
    bos: bool | None

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"{self.what}: window must be at least 2 tokens, got {self.window}")
        if self.windows < 1:
            raise ValueError(f"{self.what}: windows must be at least 1, got {self.windows}")
        if not 0.0 <= self.skip_fraction < 1.0:
            raise ValueError(
                f"{self.what}: skip_fraction must be in [0, 1), got {self.skip_fraction}"
            )

    def parts(self, text: Text | None, text_or_ids: TextOrIds) -> torch.Tensor:
        """[windows, window] int64."""
        first = self._first(text)
        ids = self._ids(text, text_or_ids, first)
        fresh = self.window - (first is not None)  # tokens of text in a window
        needed = fresh * self.windows
        if ids.numel() < needed:
            raise ValueError(
                f"{self.what}: {self.windows} windows of {self.window} tokens need {needed} "
                f"tokens, but after the skipped beginning there are {ids.numel()}"
            )
        parts = ids[:needed].view(self.windows, fresh)
        if first is None:
            return parts
        return torch.cat([parts.new_full((self.windows, 1), first), parts], dim=1)

    def _first(self, text: Text | None) -> int | None:
        """The token that every window starts with, None if windows start with text."""
        try:
            bos = text is not None and begins_with_bos(text) if self.bos is None else bool(self.bos)
            token = text.bos_id if text is not None and bos else None
        except LookupError:  # ids only: no tokenizer says what a sequence begins with
            bos, token = bool(self.bos), None
        if bos and token is None:
            raise ValueError(f"{self.what}: bos=True, but the model's tokenizer names no BOS token")
        return token

    def _ids(self, text: Text | None, text_or_ids: TextOrIds, bos: int | None) -> torch.Tensor:
        """The ids to evaluate, [T] int64, after the skipped beginning and without `bos` in
        front."""
        if isinstance(text_or_ids, str):
            if text is None:
                raise ValueError(
                    f"{self.what}: a text needs a tokenizer, and the model comes without one"
                )
            joined = join_lines(text_or_ids)
            joined = joined[_skipped(len(joined), self.skip_fraction) :]
            return torch.tensor(text.encode(joined, special=False), dtype=torch.int64)
        if isinstance(text_or_ids, torch.Tensor):
            ids = text_or_ids
            if ids.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{self.what}: token ids must be int64 or int32, got {ids.dtype}")
            if ids.dim() != 1:
                raise ValueError(
                    f"{self.what}: token ids must have shape [T], got {list(ids.shape)}"
                )
            ids = ids.to("cpu", torch.int64)
        else:
            ids = torch.tensor(list(text_or_ids), dtype=torch.int64)
        if bos is not None and ids[:1].tolist() == [bos]:
            ids = ids[1:]
        return ids[_skipped(ids.numel(), self.skip_fraction) :]

    def check(self, model: Any, name: str) -> None:
        """Raises ValueError for a model that cannot take these windows."""
        limit = getattr(model, "max_seq_len", None)
        if limit is None:  # a transformers model
            limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and self.window > limit:
            raise ValueError(
                f"{self.what}: a window of {self.window} tokens exceeds {name}'s context of "
                f"{limit} tokens"
            )
        if isinstance(model, torch.nn.Module) and _drops(model):
            raise ValueError(
                f"{self.what}: {name} is in training mode, where dropout makes its predictions "
                "random: call .eval() first"
            )


def _drops(model: torch.nn.Module) -> bool:
    return any(
        module.training and isinstance(module, torch.nn.Dropout) and module.p > 0
        for module in model.modules()
    )


def _logits(model: Any, ids: torch.Tensor, what: str, name: str) -> torch.Tensor:
    """[T, vocab] of one window."""
    device = getattr(model, "device", None)
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None, :].to(device)).logits
    if logits.dim() != 3 or logits.shape[:2] != (1, ids.numel()):
        raise ValueError(
            f"{what}: {name} must give logits of shape [1, {ids.numel()}, vocab], got "
            f"{list(logits.shape)}"
        )
    return logits[0]


def _row_blocks(rows: int, vocab: int) -> list[tuple[int, int]]:
    step = max(1, _ENTRIES // vocab)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of logits less their largest, exp of these, and the sum of that in float64, [rows, 1].

    log_softmax in float32 would be wrong by some 3e-6 for each entry of a vocabulary of 262,144,
    which is not little beside the KL divergence of 8-bit weights (1e-4).
    """
    x = logits.float()
    x = x - x.amax(dim=-1, keepdim=True)
    e = x.exp()
    return x, e, e.sum(dim=-1, keepdim=True, dtype=torch.float64)


def _token_nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T - 1] float64: -log p(ids[t + 1] | logits[t]), as in `window_nats`."""
    targets = ids[1:].to(logits.device)
    parts = [torch.zeros(0, dtype=torch.float64)]
    for start, stop in _row_blocks(targets.numel(), logits.shape[-1]):
        x, _, total = _softmax(logits[start:stop])
        parts.append((total.log() - x.gather(1, targets[start:stop, None]))[:, 0].cpu())
    return torch.cat(parts)


def window_nats(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum of -log p(ids[t + 1] | logits[t]) over t, in nats.

    logits: [T, vocab], any float dtype; ids: [T] int64. Exponentials in float32, sums in float64.
    """
    return _token_nats(logits, ids).sum().item()


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(logits)) of every row, in nats, [T] float64.

    reference, logits: [T, vocab], any float dtype. Exponentials in float32, sums in float64; what
    rounding makes negative counts as 0. An entry that the reference rules out (-inf) contributes 0;
    one that only the model rules out makes the row infinite.
    Raises ValueError for different shapes.
    """
    if reference.dim() != 2 or reference.shape != logits.shape:
        raise ValueError(
            f"kl_divergence: expected two tensors of the same shape [T, vocab], got "
            f"{list(reference.shape)} and {list(logits.shape)}"
        )
    parts = [torch.zeros(0, dtype=torch.float64)]
    for start, stop in _row_blocks(*reference.shape):
        x, e, x_total = _softmax(reference[start:stop])
        y, _, y_total = _softmax(logits[start:stop].to(x.device))
        terms = x.sub_(y).mul_(e).masked_fill_(e == 0, 0.0)  # 0 log 0 = 0
        mean = terms.sum(dim=-1, keepdim=True, dtype=torch.float64) / x_total
        kl = mean + y_total.log() - x_total.log()
        parts.append(kl[:, 0].clamp_(min=0.0).cpu())
    return torch.cat(parts)


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / math.sqrt(values.numel())).item() if values.numel() > 1 else math.nan


class _Tally:
    """What is kept of a model while windows go by: a few numbers per token."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name
        self.nats: list[torch.Tensor] = []
        self.kl: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        nats = _token_nats(logits, ids)
        if not torch.isfinite(nats).all():
            raise RuntimeError(
                f"{self.what}: the logits of window {len(self.nats)} give {nats.sum().item()}; "
                f"those of {self.name} are not finite"
            )
        self.nats.append(nats)

    def add_against(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Both [T, vocab]; the last row predicts nothing and is left out."""
        if reference.shape != logits.shape:
            raise ValueError(
                f"{self.what}: {self.name} has a vocabulary of {logits.shape[1]}, the reference "
                f"one of {reference.shape[1]}: their predictions cannot be compared"
            )
        self.kl.append(kl_divergence(reference[:-1], logits[:-1]))
        self.same.append((reference[:-1].argmax(1).cpu() == logits[:-1].argmax(1).cpu()).double())

    @property
    def window_means(self) -> tuple[float, ...]:
        return tuple(nats.sum().item() / nats.numel() for nats in self.nats)

    @property
    def mean(self) -> float:
        means = self.window_means
        return math.fsum(means) / len(means)

    def divergence(self, reference: _Tally) -> Divergence:
        kl, same = torch.cat(self.kl), torch.cat(self.same)
        ratio = math.exp(self.mean - reference.mean)
        paired = _standard_error(torch.cat(self.nats) - torch.cat(reference.nats))
        return Divergence(
            kl_mean=kl.mean().item(),
            kl_error=_standard_error(kl),
            kl_p99=torch.quantile(kl, 0.99).item(),
            kl_max=kl.max().item(),
            top1=same.mean().item(),
            top1_error=_standard_error(same),
            ratio=ratio,
            ratio_error=ratio * paired,
        )


def perplexity(
    decoder: Any,
    text_or_ids: TextOrIds,
    *,
    window: int = 512,
    windows: int = 8,
    skip_fraction: float = 0.1,
    bos: bool | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `decoder` on the first `windows` independent windows of `window` tokens of a
    text.

    decoder: a QuantDecoder, a causal model of transformers, or anything else that maps ids [1, T]
        to something with logits [1, T, vocab].
    text_or_ids: a text, or token ids [T]. Of a text, single newlines are joined with a space, then
        the first `skip_fraction` of the characters is dropped (front matter), and the rest is
        tokenized without special tokens. Of ids, the first `skip_fraction` of the ids is dropped.
    window: tokens per window, at least 2; each window starts with an empty context and gives window
        - 1 predictions.
    bos: whether every window starts with the model's BOS, which is then one of its `window` tokens
        and is not predicted. None: as the model's tokenizer does for a plain text (Gemma's does,
        SmolLM2's does not). A BOS in front of given ids is then not taken for text.
    tokenizer: of transformers, or a `qkernels.tokenizer.Tokenizer`, for a model that has none.
    progress: called as progress(windows done, windows) after every window.

    Raises ValueError if the text is too short, or an argument is out of range, and RuntimeError if
    logits are not finite.
    """
    plan = _Plan("perplexity", window, windows, skip_fraction, bos)
    plan.check(decoder, "the decoder")
    tally = _Tally(plan.what, "the decoder")
    for index, part in enumerate(plan.parts(_text(decoder, tokenizer), text_or_ids)):
        tally.add(_logits(decoder, part, plan.what, tally.name), part)
        if progress is not None:
            progress(index + 1, windows)
    mean = tally.mean
    return Perplexity(math.exp(mean), mean, tally.window_means, window, windows * (window - 1))


def _text(model: Any, tokenizer: Any) -> Text | None:
    if tokenizer is not None:
        return text_of_tokenizer(tokenizer)
    text: Text | None = getattr(model, "text", None)
    return text


def compare(
    reference: Any,
    candidates: Mapping[str, Any],
    text_or_ids: TextOrIds,
    *,
    window: int = 512,
    windows: int = 8,
    skip_fraction: float = 0.1,
    bos: bool | None = None,
    tokenizer: Any = None,
    name: str = "float",
    progress: Progress | None = None,
) -> Report:
    """Perplexity of several models on the same windows, and how far their predictions are from
    those of a reference: KL divergence and top-1 agreement over every position that predicts.

    reference: a QuantDecoder, a causal model of transformers, or anything else that maps ids [1, T]
        to something with logits [1, T, vocab]; None for none. name: of its row. candidates: the
        same, by the names of their rows.
    text_or_ids, window, windows, skip_fraction, bos: as for `perplexity`. The windows are the same
        for all models, so their vocabularies must be. tokenizer: as there; None is that of the
        reference or, if it has none, of the first candidate with one.
    progress: called as progress(done, total) after every window of every model.

    Windows go through the models one after the other. At any time the logits of one window are kept
    of the reference and of one candidate (537 MB each for 512 tokens of Gemma's 262,144 entries,
    101 MB for SmolLM2), whatever the number of windows and models.

    Raises ValueError if the text is too short, an argument is out of range, a name stands twice or
    vocabularies differ, and RuntimeError if logits are not finite.
    """
    plan = _Plan("compare", window, windows, skip_fraction, bos)
    if not candidates and reference is None:
        raise ValueError("compare: expected a reference or candidates, got neither")
    if reference is not None and name in candidates:
        raise ValueError(f"compare: the reference and a candidate are both called {name!r}")
    models = {**({} if reference is None else {name: reference}), **candidates}
    for label, model in models.items():
        plan.check(model, label)
    texts = (_text(model, tokenizer) for model in models.values())
    text = next((text for text in texts if text is not None), None)
    tallies = {label: _Tally(plan.what, label) for label in models}
    done, total = 0, windows * len(models)
    for part in plan.parts(text, text_or_ids):
        truth: torch.Tensor | None = None
        for label, model in models.items():
            logits = _logits(model, part, plan.what, label)
            tallies[label].add(logits, part)
            if reference is not None and label == name:
                truth = logits
            elif truth is not None:
                tallies[label].add_against(truth, logits)
            del logits
            done += 1
            if progress is not None:
                progress(done, total)
    rows = []
    for label, model in models.items():
        tally = tallies[label]
        compared = reference is not None and label != name
        rows.append(
            Row(
                label,
                math.exp(tally.mean),
                tally.window_means,
                tally.divergence(tallies[name]) if compared else None,
                model_size(model) if isinstance(model, torch.nn.Module) else None,
            )
        )
    return Report(tuple(rows), window, windows, windows * (window - 1))
