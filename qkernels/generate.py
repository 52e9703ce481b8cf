"""Text generation: settings, stop rules, timings, and the loop over a batch of sequences."""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from .backends import select
from .int_buffer import IntBuffer
from .ops.sample import check_tokens

# Tokens of prompts per call of the model: enough to make its matrices compute-bound, while a call
# stays short.
PREFILL_CHUNK = 512
# Sequences decoded together by `generate`; more wait until one is finished.
MAX_BATCH = 32


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop.

    max_new_tokens: at most so many tokens per prompt. temperature: 0 is greedy. top_k: 0 is off.
    top_p: 1 is off. min_p: keeps tokens at least that likely relative to the likeliest; 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of tokens that occurred,
    prompt included; 1 is off. seed: of the draws, prompt i of a call uses seed + i; None is random.
    stop: texts that end the generation and are cut off. stop_at_eos: whether
    tokens of `eos_ids` end it.

    Raises ValueError or TypeError for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, what in (("stop", "a text or a list of texts"), ("eos_ids", "a list of ids")):
            value = getattr(self, name)
            if not isinstance(value, Iterable):
                raise TypeError(f"{name} must be {what}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        self._whole("max_new_tokens", 1, None)
        self._whole("top_k", 0, 2**31 - 1)
        if self.seed is not None:
            self._whole("seed", 0, 2**62)
        self._real("temperature", 0.0, math.inf)
        self._real("top_p", 0.0, 1.0, open_below=True)
        self._real("min_p", 0.0, 1.0)
        self._real("repetition_penalty", 0.0, math.inf, open_below=True)
        if not isinstance(self.stop_at_eos, bool):
            raise TypeError(f"stop_at_eos must be a bool, got {self.stop_at_eos!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be texts that are not empty, got {text!r}")
        for token in self.eos_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"eos_ids must be token ids, got {token!r}")

    def _whole(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {limits}, got {value}")

    def _real(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (low < value if open_below else low <= value) or value > high or math.isinf(value):
            above = f"above {low:g}" if open_below else f"at least {low:g}"
            limits = above + ("" if math.isinf(high) else f" and at most {high:g}")
            raise ValueError(f"{name} must be {limits}, got {value}")

    def updated(self, **changes: Any) -> GenerationSettings:
        """A copy with some values changed; TypeError names a setting that does not exist."""
        known = [f.name for f in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(
                f"unknown generation settings {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return replace(self, **changes)

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any]) -> GenerationSettings:
        """The defaults of a model from its generation_config.json; without `do_sample`, greedy.

        What the file does not mention is off. Values out of range are those of the file: ValueError
        names it.
        """
        values: dict[str, Any] = {}
        eos = raw.get("eos_token_id")
        if eos is not None:
            values["eos_ids"] = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if raw.get("do_sample"):
            values["temperature"] = 1.0
            for name in ("temperature", "top_k", "top_p", "min_p"):
                if raw.get(name) is not None:
                    values[name] = raw[name]
        for name in ("repetition_penalty", "max_new_tokens"):
            if raw.get(name) is not None:
                values[name] = raw[name]
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generation_config of the model: {error}") from error


@dataclass
class Timings:
    """Seconds and tokens of one call. load: of the model, once. first_token: from the call to the
    first new token.

    decode_tokens and decode: all new tokens but the first of each sequence, which comes out of the
    prompt's pass.
    """

    load: float = 0.0
    prefill: float = 0.0
    prefill_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, whose keys and values were still there
    decode: float = 0.0
    decode_tokens: int = 0
    first_token: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill if self.prefill else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode if self.decode else 0.0


@dataclass
class GenerationOutput:
    """Result of `generate`, one entry per prompt.

    texts: without the prompt, the end-of-sequence token and the stop text. tokens: every new token,
    those included. finish_reasons: "eos", "stop" (a stop text) or "length" (max_new_tokens, or the
    context is full).
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)


class PieceDecoder(Protocol):
    """Turns tokens into text one by one, holding back what is not a whole character yet."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class TextAssembler:
    """Text of a growing sequence of tokens, cut at the first stop text.

    Whatever may be the beginning of a stop text is held back until the next tokens decide.
    """

    def __init__(self, decoder: PieceDecoder, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` when a stop text is complete."""
        return self._take(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """The rest, once no token follows, without a character whose last bytes never came."""
        return "" if self.stopped else self._take(self._decoder.flush().rstrip("\ufffd"), last=True)

    def _take(self, text: str, last: bool) -> str:
        if not self._stop:
            return text  # nothing is ever held back
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, without being complete."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Pool(Protocol):
    """Where sequences keep their keys and values; `nn.decoder.KvPool` on the paged cache."""

    def add(self) -> int: ...

    def free(self, handle: int) -> None: ...

    def forward(
        self, parts: Sequence[tuple[int, Sequence[int]]], last_only: bool
    ) -> torch.Tensor: ...


@dataclass
class Request:
    """One prompt on its way. ids: prompt and new tokens; done: how many are in the cache."""

    index: int
    ids: list[int]
    prompt: int
    assembler: TextAssembler
    handle: int = -1
    done: int = 0
    finish: str | None = None

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt :]

    @property
    def new_count(self) -> int:
        return len(self.ids) - self.prompt


def penalize(values: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Logits of tokens that have occurred, made less likely. penalty: [1] beside them: a number
    would become a product with its reciprocal on a GPU."""
    return torch.where(values > 0, values / penalty, values * penalty)


class Sampler:
    """Next tokens for the sequences of a batch; everything but the penalty is one op.

    seed: of the first prompt; that of prompt i is seed + i.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self.seed = secrets.randbits(62) if settings.seed is None else settings.seed
        # Arguments of `sample` for the sequences of these seeds. Only the offsets change from token
        # to token, until a sequence comes or leaves.
        self._seeds: list[int] = []
        self._arguments: list[torch.Tensor] = []
        self._offset = IntBuffer(0, torch.int64)

    def __call__(self, logits: torch.Tensor, sequences: Sequence[Request]) -> list[int]:
        """logits [B, V] float32 (overwritten when a penalty is on) -> B tokens. Raises RuntimeError
        for a row with a NaN or nothing but -inf."""
        settings, device = self.settings, logits.device
        if settings.repetition_penalty != 1.0:
            penalty = torch.full((1,), settings.repetition_penalty, device=device)
            for row, sequence in zip(logits, sequences, strict=True):
                ids = sorted(set(sequence.ids))
                seen = torch.tensor(ids, dtype=torch.int64, device=device)
                row[seen] = penalize(row[seen], penalty)
        seeds = [self.seed + s.index for s in sequences]
        if seeds != self._seeds:
            self._seeds, self._arguments = seeds, self._arguments_of(seeds, device)
            self._offset = IntBuffer(len(seeds), torch.int64)
        offset = self._offset.write([s.new_count for s in sequences]).to(device)
        tokens = select("sample", device)(logits, *self._arguments, offset).tolist()
        check_tokens(tokens)  # a kernel on a GPU could not
        return tokens

    def _arguments_of(self, seeds: list[int], device: torch.device) -> list[torch.Tensor]:
        """temperature, top_k, top_p, min_p and seed, [B] each."""
        settings, rows = self.settings, (len(seeds),)
        return [
            torch.full(rows, settings.temperature, dtype=torch.float32, device=device),
            torch.full(rows, settings.top_k, dtype=torch.int32, device=device),
            torch.full(rows, settings.top_p, dtype=torch.float32, device=device),
            torch.full(rows, settings.min_p, dtype=torch.float32, device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
        ]


# The next token of each of some sequences, by whoever runs the model and draws at once. The last
# argument: whether the same sequences will want another one, as far as is known before they are
# seen. It may then be on its way already.
Decode = Callable[[Sequence[Request], Sampler, bool], list[int]]


@dataclass(frozen=True)
class Piece:
    """What one new token brought: a sequence, its token and the text that became certain."""

    index: int
    token: int
    text: str


class Loop:
    """Decodes a batch of sequences, each until its own end; new ones come in as others leave.

    pool: where keys and values live. keep: sequences that stay in the pool at the end (a chat's),
    by the caller's wish. decode: of pools that decode by themselves.
    """

    def __init__(
        self,
        pool: Pool,
        sequences: Sequence[Request],
        settings: GenerationSettings,
        context: int,
        *,
        keep: bool = False,
        max_batch: int = MAX_BATCH,
        decode: Decode | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.timings = Timings()
        self._pool = pool
        self._settings = settings
        self._context = context
        self._keep = keep
        self._max_batch = max_batch
        self._clock = clock
        self._sampler = Sampler(settings)
        self._step = decode or self._by_logits
        self._waiting = deque(sequences)
        self._running: list[Request] = []

    def run(self, start: float | None = None) -> Iterator[Piece]:
        """Yields a piece per new token. start: when the caller was called, for the time to the
        first token.
        """
        start = self._clock() if start is None else start
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._max_batch:
                    sequence = self._waiting.popleft()
                    if sequence.handle < 0:
                        sequence.handle = self._pool.add()
                    self._running.append(sequence)
                reading = [s for s in self._running if s.done < s.prompt]
                pieces = self._prefill(reading) if reading else self._decode()
                if pieces and not self.timings.first_token:
                    self.timings.first_token = self._clock() - start
                yield from pieces
        finally:  # also when the caller stops early, or Ctrl-C
            for sequence in self._running:
                self._release(sequence)
            self._running = []

    def _prefill(self, reading: Sequence[Request]) -> list[Piece]:
        """One chunk of the prompts that are not read yet; those that end in it give their first
        token.
        """
        begin, room = self._clock(), PREFILL_CHUNK
        chosen, parts = [], []
        for sequence in reading:
            count = min(room, sequence.prompt - sequence.done)
            if count == 0:
                break
            chosen.append(sequence)
            parts.append((sequence.handle, sequence.ids[sequence.done : sequence.done + count]))
            room -= count
        logits = self._pool.forward(parts, last_only=True)
        for sequence, (_, ids) in zip(chosen, parts, strict=True):
            sequence.done += len(ids)
        ended = [i for i, s in enumerate(chosen) if s.done == s.prompt]
        pieces: list[Piece] = []
        if ended:
            last = logits if len(ended) == len(chosen) else logits[ended]
            ending = [chosen[i] for i in ended]
            pieces = self._advance(self._sampler(last, ending), ending)
        self.timings.prefill += self._clock() - begin
        self.timings.prefill_tokens += PREFILL_CHUNK - room
        return pieces

    def _decode(self) -> list[Piece]:
        begin, running = self._clock(), list(self._running)
        tokens = self._step(running, self._sampler, not any(map(self._is_full, running)))
        for sequence in running:
            sequence.done += 1
        pieces = self._advance(tokens, running)
        self.timings.decode += self._clock() - begin
        self.timings.decode_tokens += len(running)
        return pieces

    def _by_logits(self, sequences: Sequence[Request], sampler: Sampler, more: bool) -> list[int]:
        """Decodes through the pool's logits."""
        parts = [(s.handle, s.ids[-1:]) for s in sequences]
        return sampler(self._pool.forward(parts, last_only=True), sequences)

    def _is_full(self, sequence: Request, coming: int = 1) -> bool:
        """Whether it ends with `coming` more tokens, whichever they are."""
        full = sequence.new_count + coming >= self._settings.max_new_tokens
        return full or len(sequence.ids) + coming > self._context

    def _advance(self, tokens: Sequence[int], sequences: Sequence[Request]) -> list[Piece]:
        """Adds the next token to each sequence and sees whether it ends there."""
        settings, pieces = self._settings, []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.ids.append(token)
            text = ""
            if settings.stop_at_eos and token in settings.eos_ids:
                sequence.finish = "eos"
            else:
                text = sequence.assembler.push(token)
                if sequence.assembler.stopped:
                    sequence.finish = "stop"
                elif self._is_full(sequence, coming=0):
                    sequence.finish = "length"
            if sequence.finish:
                if sequence.finish != "stop":
                    text += sequence.assembler.finish()
                    if (
                        sequence.assembler.stopped
                    ):  # the last, held-back bytes completed a stop text
                        sequence.finish = "stop"
                self._running.remove(sequence)
                self._release(sequence)
            pieces.append(Piece(sequence.index, token, text))
        return pieces

    def _release(self, sequence: Request) -> None:
        if not self._keep and sequence.handle >= 0:
            self._pool.free(sequence.handle)
            sequence.handle = -1


class TextStream:
    """Text of one prompt as it is decoded: iterate over it. After that, or in between, see what
    came so far.

    tokens: new tokens, the end-of-sequence token included. finish_reason: None while running.
    `close` ends it early.
    """

    def __init__(self, sequence: Request, loop: Loop, pieces: Iterator[Piece], load: float) -> None:
        self._sequence = sequence
        self._loop = loop
        self._pieces = pieces
        self.text = ""
        self.timings = loop.timings
        self.timings.load = load

    @property
    def tokens(self) -> list[int]:
        return self._sequence.new

    @property
    def finish_reason(self) -> str | None:
        return self._sequence.finish

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for piece in self._pieces:
            if piece.text:
                self.text += piece.text
                return piece.text
        raise StopIteration

    def close(self) -> None:
        """Ends the generation and frees its memory; iterating further gives nothing."""
        self._pieces.close()  # type: ignore[attr-defined]

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_prompt(ids: Sequence[int], vocab: int, context: int, which: str = "prompt") -> list[int]:
    """The ids as a list, after every check. Raises ValueError or TypeError; `which` names the
    prompt in messages.
    """
    out = []
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"{which}: token {position} must be an integer, got {token!r}")
        value = token.__index__()
        if not 0 <= value < vocab:
            raise ValueError(
                f"{which}: token id {value} at position {position} is outside the vocabulary [0, "
                f"{vocab})"
            )
        out.append(value)
    if not out:
        raise ValueError(f"{which}: expected at least one token, got an empty prompt")
    if len(out) > context:
        raise ValueError(f"{which}: {len(out)} tokens exceed the context of {context} tokens")
    return out
