"""`qkernels chat`: a conversation on a terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import Any

from . import speed
from .errors import BadInput, describe
from .loading import Loaded, LoadOptions, load
from .output import Answer, note, status, warn

HELP = """\
/reset          forget the conversation, keep the system message
/system TEXT    set the system message and forget the conversation; without TEXT: remove it
/help           this
/exit           leave (also Ctrl-D)
Ctrl-C ends an answer. Up and down recall earlier lines."""


class Conversation:
    """The messages so far, and what a line from the user does to them."""

    def __init__(self, loaded: Loaded, system: str | None, options: dict[str, Any]) -> None:
        self.loaded = loaded
        self.system = system
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def command(self, line: str) -> bool:
        """Does what a line beginning with "/" says; False to leave."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/reset":
            self.reset()
            note("the conversation is empty again")
        elif word == "/system":
            self.system = rest.strip() or None
            self.reset()
            note(
                "no system message"
                if self.system is None
                else "system message set; the conversation is empty"
            )
        else:
            if word != "/help":
                warn(f"no command {word}")
            note(HELP)
        return True

    def ask(self, text: str) -> None:
        """Streams the answer to `text`. What came before Ctrl-C stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        out = Answer()
        try:
            stream = self.loaded.decoder.chat(self.messages, stream=True, **self.options)
        except (
            ValueError
        ) as error:  # a conversation longer than the context, for one: it can be reset
            self.messages.pop()
            warn(describe(error))
            return
        interrupted = False
        with closing(stream):
            try:
                for piece in stream:
                    out.write(piece)
            except KeyboardInterrupt:
                interrupted = True
            out.end()
        if stream.text:
            self.messages.append({"role": "assistant", "content": stream.text})
        else:
            self.messages.pop()
        note("interrupted" if interrupted else speed.short(stream))


def _lines(terminal: bool) -> Any:
    """Lines from the user. Ctrl-C at the prompt gives an empty line; Ctrl-D, or the end of a pipe,
    ends.
    """
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            if terminal and sys.stdout.isatty():
                yield input("> ")
            else:
                if terminal:  # stdout is redirected: the prompt goes where a person sees it
                    status().print("> ", end="")
                line = sys.stdin.readline()
                if not line:
                    return
                yield line.removesuffix("\n")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            status().print()
            yield ""
        except UnicodeDecodeError as error:
            raise BadInput(f"stdin: not valid {error.encoding}: {error.reason}") from error


def run(options: LoadOptions, system: str | None, kwargs: dict[str, Any]) -> None:
    loaded = load(options)
    terminal = sys.stdin.isatty()
    conversation = Conversation(loaded, system, kwargs)
    if terminal:
        note(f"loaded in {loaded.seconds:.2f} s; /help lists the commands")
    for line in _lines(terminal):
        text = line.strip()
        if text.startswith("/"):
            if not conversation.command(text):
                return
        elif text:
            conversation.ask(text)
