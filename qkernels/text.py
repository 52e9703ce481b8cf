"""Between text and token ids: one face for the tokenizers of GGUF files and of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .generate import PieceDecoder
from .loading import Checkpoint
from .tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


class Text(Protocol):
    """What a decoder needs of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a sequence, None if there is none."""
        ...

    @property
    def transformers(self) -> Any:
        """The same as a transformers tokenizer."""
        ...

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a prompt. special: with the tokens that the model wants around it."""
        ...

    def chat(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the answer begins, by the model's template."""
        ...

    def stream_decoder(self) -> PieceDecoder: ...


class NoText:
    """Of a model without a tokenizer: it runs on ids, and texts are empty."""

    def __init__(self, source: str) -> None:
        self._source = source

    def _refuse(self) -> LookupError:
        return LookupError(
            f"{self._source} comes without a tokenizer: give prompts as token ids, or "
            "QuantDecoder.from_pretrained(..., tokenizer=...)"
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def transformers(self) -> Any:
        raise self._refuse()

    def encode(self, text: str, special: bool = True) -> list[int]:
        raise ValueError(str(self._refuse()))

    def chat(self, messages: Messages) -> list[int]:
        raise ValueError(str(self._refuse()))

    def stream_decoder(self) -> PieceDecoder:
        return _Silent()


class _Silent:
    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class IncrementalDecoder:
    """Streams through a tokenizer that only decodes whole lists.

    Only the tokens since the last complete character are decoded again, with one step more in front
    of them: some tokenizers treat a space differently at the beginning. Bytes that are not yet a
    character decode to U+FFFD at the end and are held back.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._shown = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._new()
        if text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character stays unfinished."""
        text = self._new()
        self._start = self._shown = len(self._ids)
        return text

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]


class OwnText:
    """The package's `Tokenizer`, which starts in a fraction of the time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._tokenizer.eos_ids

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_id

    @property
    def transformers(self) -> Any:
        return self._tokenizer.hf

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special=special)

    def chat(self, messages: Messages) -> list[int]:
        check_messages(messages)
        return self._tokenizer.encode_chat(messages)

    def stream_decoder(self) -> PieceDecoder:
        return self._tokenizer.stream()


class TransformersText:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def bos_id(self) -> int | None:
        bos: int | None = self._tokenizer.bos_token_id
        return bos

    @property
    def transformers(self) -> Any:
        return self._tokenizer

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def chat(self, messages: Messages) -> list[int]:
        check_messages(messages)
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError("chat: the model's tokenizer has no chat template")
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def stream_decoder(self) -> PieceDecoder:
        return IncrementalDecoder(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True))


def check_messages(messages: Messages) -> None:
    """Raises ValueError or TypeError unless this is a conversation."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"chat: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("chat: expected at least one message, got an empty list")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"chat: message {i} must be a mapping with role and content, got {message!r}"
            )
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise ValueError(f"chat: {key} of message {i} must be a text, got {message[key]!r}")


def text_of_tokenizer(tokenizer: Any) -> Text:
    """A tokenizer of this package, or of transformers."""
    return OwnText(tokenizer) if isinstance(tokenizer, Tokenizer) else TransformersText(tokenizer)


def text_of(checkpoint: Checkpoint, tokenizer: Any = None) -> Text:
    """The tokenizer of a checkpoint, or the one given instead."""
    if tokenizer is not None:
        return text_of_tokenizer(tokenizer)
    if checkpoint.gguf is not None:
        return OwnText(Tokenizer.from_gguf(checkpoint.gguf))
    path = Path(checkpoint.source)
    if (path / "tokenizer.json").is_file():
        return OwnText(Tokenizer.from_directory(path))
    if any((path / name).exists() for name in ("tokenizer.model", "tokenizer_config.json")):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"{path} has no tokenizer.json; its tokenizer needs the package transformers. "
                f"Type\n"
                "    pip install transformers"
            ) from error
        return TransformersText(AutoTokenizer.from_pretrained(path, local_files_only=True))
    return NoText(checkpoint.source)
