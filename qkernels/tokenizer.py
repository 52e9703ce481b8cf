"""Text to token ids and back: of GGUF files and of directories with a tokenizer.json, without importing transformers."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import chat_template
from .chat_template import ChatTemplateError
from .checkpoints import gguf_tokenizer
from .checkpoints.errors import CheckpointError
from .checkpoints.gguf import GGUFFile
from .checkpoints.gguf_tokenizer import SPACE, byte_alphabet

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ChatTemplateError", "StreamDecoder", "Tokenizer"]

NO_TEMPLATE = "this tokenizer has no chat template; pass template=, or give the prompt as text"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's special tokens and chat templates.

    backend: does the work; `bos_id`, `pad_id`, `unk_id`: token ids or None; `eos_ids`: every id that ends a
    generation, the model's EOS first; `chat_templates`: by name, the usual one is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        unk_id: int | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.unk_id = unk_id
        self.chat_templates = dict(chat_templates or {})
        self._added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in self._added.items() if token.special)
        self._speller = _speller(backend)

    @classmethod
    def from_gguf(cls, source: GGUFFile | str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in the metadata of a GGUF file.

        Raises `CheckpointError` for a file that cannot be read, has no tokenizer or one that is not supported.
        """
        if not isinstance(source, GGUFFile):
            with GGUFFile(source) as file:
                return cls.from_gguf(file)
        where, metadata = source.path, source.metadata
        backend = gguf_tokenizer.build_backend(where, metadata)
        templates = {}
        for key in metadata:
            prefix, name = key[:23], key[23:]
            if prefix == "tokenizer.chat_template" and (not name or name.startswith(".")):
                if isinstance(template := metadata[key], str):
                    templates[name[1:] or "default"] = template
        return cls(
            backend,
            bos_id=gguf_tokenizer.token_id(where, metadata, "bos"),
            eos_ids=gguf_tokenizer.end_ids(where, metadata),
            pad_id=gguf_tokenizer.token_id(where, metadata, "padding"),
            unk_id=gguf_tokenizer.token_id(where, metadata, "unknown"),
            chat_templates=templates,
        )

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a directory with tokenizer.json and, if present, tokenizer_config.json,
        generation_config.json, chat_template.jinja and additional_chat_templates/.

        Raises `CheckpointError` if one of them is missing or broken, ImportError without `tokenizers`.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "reading tokenizers needs the package tokenizers. Type\n    pip install tokenizers"
            ) from error
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{folder}: expected a tokenizer.json there, found none")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise CheckpointError(f"{file}: expected a tokenizer of the package tokenizers: {error}") from error
        config = _json_object(folder / "tokenizer_config.json")
        ids: dict[str, int | None] = {}
        for name in ("bos", "eos", "pad", "unk"):
            token = config.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            ids[name] = backend.token_to_id(text) if isinstance(text, str) else None
        ends = [ids["eos"]]
        for name in ("generation_config.json", "config.json"):
            stated = _json_object(folder / name).get("eos_token_id")
            ends += [i for i in (stated if isinstance(stated, list) else [stated]) if isinstance(i, int)]
        return cls(
            backend,
            bos_id=ids["bos"],
            eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
            pad_id=ids["pad"],
            unk_id=ids["unk"],
            chat_templates=_templates(folder, config),
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """`from_directory` for a directory, `from_gguf` for anything else."""
        return cls.from_directory(path) if os.path.isdir(path) else cls.from_gguf(path)

    @property
    def eos_id(self) -> int | None:
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, bos {self.bos_id}, eos {self.eos_ids})"

    def id_to_token(self, token_id: int) -> str | None:
        """How the vocabulary spells the token, None if there is none of this id."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text. Special tokens spelled out in it are recognised.

        add_special: with the BOS and EOS that the model's metadata ask for; prompts of `render_chat` have their own.
        Raises TypeError for what is not a str, ValueError for lone surrogates, which no UTF-8 has.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: expected text (str), got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"encode: expected Unicode text, got a lone surrogate at {error.start}") from None
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Ids that no token has are nothing, since embeddings
        are often padded. Raises TypeError and ValueError for what cannot be an id."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True, prompt: Sequence[int] = ()) -> StreamDecoder:
        """A decoder to feed one id after the other. prompt: the ids before, which are not returned again."""
        return StreamDecoder(self, skip_special=skip_special, prompt=prompt)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, by the model's chat template.

        messages: dicts with "role" and "content". tools: JSON schemas of functions. template: another template, or the
        name of one of `chat_templates`; by default "tool_use" if there are tools and the model has it, else "default".
        variables: further names that the template knows. Raises `ChatTemplateError`, TypeError for bad messages.
        """
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
            if template not in self.chat_templates:
                named = f" (only {', '.join(sorted(self.chat_templates))})" if self.chat_templates else ""
                raise ChatTemplateError(NO_TEMPLATE + named)
        tokens = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        spelled = {f"{name}_token": self.id_to_token(i) for name, i in tokens.items() if i is not None}
        return chat_template.render(
            self.chat_templates.get(template, template), messages, tools=tools,
            add_generation_prompt=add_generation_prompt, **{**spelled, **variables},
        )  # fmt: skip

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of `render_chat(messages, **options)`; nothing is added, as the template writes its own BOS."""
        return self.encode(self.render_chat(messages, **options), add_special=False)

    @cached_property
    def hf(self) -> Any:
        """The same tokenizer as a `transformers.PreTrainedTokenizerFast`. Raises ImportError without transformers."""
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise ImportError("Tokenizer.hf needs the package transformers. Type\n    pip install transformers") from error
        tokens = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            clean_up_tokenization_spaces=False,
            **{f"{name}_token": self.id_to_token(i) for name, i in tokens.items() if i is not None},
        )
        if self.chat_templates:
            only = self.chat_templates.get("default") if len(self.chat_templates) == 1 else None
            wrapped.chat_template = only or dict(self.chat_templates)
        return wrapped


class StreamDecoder:
    """Ids in, one by one; text out, as soon as it is complete.

    The pieces joined, with `flush` at the end, are `Tokenizer.decode` of all ids: a character of several tokens comes
    with its last one, and U+FFFD stands only for bytes that can be no UTF-8, whatever follows.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer._special if skip_special else frozenset()
        speller = tokenizer._speller
        self._text: _Bytes | _Window = (
            _Window(tokenizer.backend, skip_special) if speller is None else _Bytes(tokenizer, speller)
        )
        for token_id in prompt:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" as long as a character is unfinished."""
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            raise TypeError(f"expected a token id (int), got {type(token_id).__name__}")
        token_id = token_id.__index__()
        if not 0 <= token_id < 1 << 32:
            raise ValueError(f"expected a token id, got {token_id}")
        return "" if token_id in self._skip else self._text.push(token_id)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character stays unfinished, else mostly nothing."""
        return self._text.flush()


class _Speller:
    """Tokens as bytes, for the two kinds of vocabularies that have that."""

    def __init__(self, byte_level: bool, strip: bool) -> None:
        self.strip = strip  # one space at the start, the one that encoding added
        self._byte_of = {char: byte for byte, char in enumerate(byte_alphabet())} if byte_level else None

    def spell(self, token: str) -> bytes:
        if self._byte_of is not None:
            try:
                return bytes(map(self._byte_of.__getitem__, token))
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes((int(token[3:5], 16),))
            except ValueError:
                pass
        return token.replace(SPACE, " ").encode()


def _speller(backend: tokenizers.Tokenizer) -> _Speller | None:
    """How the backend's decoder makes bytes of tokens; None for decoders that work on text."""
    if backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return _Speller(True, False)
    parts = state.get("decoders", [])
    kinds = [part["type"] for part in parts]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    if (parts[0]["pattern"], parts[0]["content"]) != ({"String": SPACE}, " "):
        return None
    if kinds[3:] and [parts[3][key] for key in ("content", "start", "stop")] != [" ", 1, 0]:
        return None
    return _Speller(False, bool(kinds[3:]))


class _Bytes:
    """Tokens are bytes: an incremental UTF-8 decoder holds back what is unfinished. Constant work per token."""

    def __init__(self, tokenizer: Tokenizer, speller: _Speller) -> None:
        self._tokenizer = tokenizer
        self._speller = speller
        self._strip = speller.strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        added = self._tokenizer._added.get(token_id)
        if added is not None:
            stored = added.content.encode()
        else:
            token = self._tokenizer.backend.id_to_token(token_id)
            stored = b"" if token is None else self._speller.spell(token)
        if self._strip and stored:
            self._strip = False
            stored = stored.removeprefix(b" ")
        return self._decoder.decode(stored)

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _Window:
    """Any other decoder (WordPiece, Metaspace, ...), whose spacing depends on neighbours: decode the last tokens with
    and without the new one, and return the difference."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool) -> None:
        self._backend = backend
        self._skip_special = skip_special
        self._ids: list[int] = []  # those returned last, for context, then those held back
        self._returned = 0  # how many of them have been returned

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, text = self._decode(self._ids[: self._returned]), self._decode(self._ids)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._returned :]
        self._returned = len(self._ids)
        return text[len(before) :]


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. Raises `CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files of their own go before those of tokenizer_config.json."""
    stated = config.get("chat_template")
    if isinstance(stated, str):
        stated = [{"name": "default", "template": stated}]
    templates = {}
    for entry in stated if isinstance(stated, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            templates[str(entry.get("name"))] = entry["template"]
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: expected a chat template: {error}") from error
    return templates
