"""What is printed after an answer: times, speeds, and the memory traffic they mean."""

from __future__ import annotations

from typing import Any

from .._format import amount
from .loading import Loaded
from .traffic import bytes_per_step


def _rate(tokens: int, seconds: float) -> str:
    noun = "token" if tokens == 1 else "tokens"
    if not tokens or seconds <= 0:
        return f"{tokens} {noun}"
    return f"{tokens} {noun} at {tokens / seconds:.1f} tok/s"


def _prompt(timings: Any) -> str:
    text = "prompt " + _rate(timings.prefill_tokens, timings.prefill)
    return text + (f" (+ {timings.reused_tokens} kept)" if timings.reused_tokens else "")


def bandwidth(decoder: Any, timings: Any, new_tokens: int) -> str:
    """Traffic of the decode steps: weights once per step, keys and values at the mean context of
    the steps.
    """
    context = timings.reused_tokens + timings.prefill_tokens + (new_tokens + 1) // 2
    weights, kv = bytes_per_step(decoder, context)
    rate = (weights + kv) * timings.decode_tokens_per_second
    return f"{amount(rate)}/s ({amount(weights)} of weights + {amount(kv)} of KV per token)"


def short(stream: Any) -> str:
    """One line for a turn of a chat."""
    timings = stream.timings
    parts = [
        f"first token {timings.first_token:.2f} s",
        _prompt(timings),
        "decode " + _rate(timings.decode_tokens, timings.decode),
    ]
    if stream.finish_reason == "length":
        parts.append("ended by a length limit")
    return "; ".join(parts)


def long(loaded: Loaded, stream: Any) -> str:
    """All there is to say about a run; no bandwidth unless something was decoded after the first
    token.
    """
    line = f"load {loaded.seconds:.2f} s; {short(stream)}"
    if stream.timings.decode_tokens:
        line += "\nread while decoding: " + bandwidth(
            loaded.decoder, stream.timings, len(stream.tokens)
        )
    return line
