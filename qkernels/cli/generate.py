"""`qkernels generate`."""

from __future__ import annotations

from typing import Any

from .errors import bad_input
from .loading import LoadOptions, load
from .output import Answer, note
from .source import read_prompt
from .speed import Stopwatch


def run(options: LoadOptions, prompt: str, chat: bool, kwargs: dict[str, Any]) -> None:
    text = read_prompt(prompt)
    loaded = load(options)
    decoder = loaded.decoder

    def start() -> Any:
        if chat:
            return decoder.chat([{"role": "user", "content": text}], stream=True, **kwargs)
        return decoder.stream(text, **kwargs)

    out = Answer()
    watch = Stopwatch(loaded)
    try:
        # ValueError is the decoder's word for what it cannot take: a prompt longer than the context, a bad setting.
        with bad_input(ValueError):
            for piece in watch.run(start):
                out.write(piece)
    except KeyboardInterrupt:
        out.end()
        note(watch.long())
        raise
    out.end()
    note(watch.long())
