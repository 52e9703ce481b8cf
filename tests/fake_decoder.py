"""A stand-in for QuantDecoder with the same surface, for tests of the command line only.

It answers with fixed words at a fixed pace, so that a test can interrupt it, count flushes and
provoke errors. Run as a script it starts the command line with itself in place of the real decoder:

    python tests/fake_decoder.py generate MODEL PROMPT ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PAUSE = float(os.environ.get("FAKE_PAUSE", "0"))  # seconds per piece
WORDS = os.environ.get("FAKE_TEXT", "Paris is the capital of France.")
CONTEXT = 32


class FakeStream:
    def __init__(self, text: str, count: int, prompt: int) -> None:
        words = [w if i == 0 else " " + w for i, w in enumerate(text.split(" "))]
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.text = ""
        self.closed = False
        self.timings = SimpleNamespace(
            load=0.5,
            prefill=0.25,
            prefill_tokens=prompt,
            reused_tokens=0,
            decode=0.0,
            decode_tokens=0,
            decode_tokens_per_second=0.0,
            first_token=0.25,
        )
        self._pieces = self._run(words, count)

    def _run(self, words: list[str], count: int) -> Iterator[str]:
        for i, word in enumerate(words):
            if i == count:
                self.finish_reason = "length"
                return
            time.sleep(PAUSE)
            self.tokens.append(i)
            self.text += word
            if i:
                self.timings.decode_tokens += 1
                self.timings.decode += 0.125
                self.timings.decode_tokens_per_second = 8.0
            yield word
        self.finish_reason = "eos"

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self.closed = True
        self._pieces.close()  # type: ignore[attr-defined]


class FakeDecoder:
    """calls: everything asked of any instance, in order."""

    calls: list[tuple[str, Any, dict[str, Any]]] = []  # noqa: RUF012
    config = SimpleNamespace(vocab=100, kv_heads=3, head_dim=64, windows=(0,) * 30)
    kv_dtype = "float16"
    act = "int8"
    weight_bytes = 96_600_000
    max_seq_len = CONTEXT

    @classmethod
    def from_pretrained(cls, path: Path, **options: Any) -> FakeDecoder:
        progress = options.pop("progress")
        cls.calls.append(("load", Path(path), options))
        if Path(path).suffix == ".broken":
            raise ValueError(f"{path}: expected the magic GGUF,\ngot b'\\x00\\x00'")
        if Path(path).suffix == ".bug":
            raise AssertionError("an assumption does not hold")
        for step in range(3):
            progress(step + 1, 3)
        return cls()

    @property
    def text(self) -> Any:
        return SimpleNamespace(
            bos_id=None, encode=lambda text, special: [ord(c) % 100 for c in text]
        )

    def __call__(self, input_ids: Any, logits_to_keep: int = 0) -> Any:
        import torch

        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 100))

    def _start(self, words: int, options: dict[str, Any]) -> FakeStream:
        if words >= CONTEXT:
            raise ValueError(f"prompt: {words} tokens do not fit the context of {CONTEXT} tokens")
        return FakeStream(WORDS, options["max_new_tokens"], words)

    def stream(self, prompt: str, **options: Any) -> FakeStream:
        self.calls.append(("stream", prompt, options))
        return self._start(len(prompt.split()), options)

    def chat(
        self, messages: list[dict[str, str]], stream: bool = True, **options: Any
    ) -> FakeStream:
        self.calls.append(("chat", [dict(m) for m in messages], options))
        return self._start(sum(len(m["content"].split()) for m in messages), options)


if __name__ == "__main__":
    import qkernels

    qkernels.QuantDecoder = FakeDecoder  # type: ignore[misc]
    from qkernels.cli import main

    main()
