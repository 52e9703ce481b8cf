"""`qkernels generate`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from . import speed
from .errors import bad_input
from .loading import LoadOptions, load
from .output import Answer, note
from .source import read_prompt


def run(options: LoadOptions, prompt: str, chat: bool, kwargs: dict[str, Any]) -> None:
    text = read_prompt(prompt)
    loaded = load(options)
    # ValueError is the decoder's word for what it cannot take: a prompt longer than the context, a
    # bad setting.
    with bad_input(ValueError):
        if chat:
            messages = [{"role": "user", "content": text}]
            stream = loaded.decoder.chat(messages, stream=True, **kwargs)
        else:
            stream = loaded.decoder.stream(text, **kwargs)
    out = Answer()
    with closing(stream):
        try:
            for piece in stream:
                out.write(piece)
        finally:  # also after Ctrl-C: the text so far ends its line, and the numbers are its own
            out.end()
            note(speed.long(loaded, stream))
