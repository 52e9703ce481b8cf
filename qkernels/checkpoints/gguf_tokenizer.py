"""The tokenizer that a GGUF file describes, built as a `tokenizers.Tokenizer`.

Text is split as llama.cpp splits it for the same metadata, so that a file gives the same ids there and here. Nothing of
transformers is imported: that alone would take four seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError
from .gguf import StringArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# llama_token_type; undefined (0) and unused (5) tokens are part of the vocabulary and nothing else
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# Expressions that split the text one after the other, each within the pieces of the one before; matches and what lies
# between them are pieces.
GPT2 = (GPT2_SPLIT,)
DIGITS = (r"\p{N}", GPT2_SPLIT)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
LLAMA3 = (LLAMA3_SPLIT,)
QWEN2 = (QWEN2_SPLIT,)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,  # what llama.cpp takes for files that do not say
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
}
# Here a piece that is a token as a whole is not merged up from bytes, and the text starts with BOS.
LLAMA3_FAMILY = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")

# Control tokens that end a turn although the metadata do not name them. llama.cpp knows them by text, too.
END_OF_TURN = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<eos>", "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip

SPACE = "\u2581"  # what a space is in SentencePiece vocabularies


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: printable Latin-1 stands for itself, the 68
    others are moved, in order, to U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def build_backend(where: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the metadata, with BOS and EOS added when encoding if they say so.

    where: the file, for messages. Raises `CheckpointError` if the metadata lack a tokenizer or have one that is not
    supported, ImportError without the package `tokenizers`.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "reading tokenizers needs the package tokenizers. Type\n    pip install tokenizers"
        ) from error
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in ("gpt2", "llama"):
        given = "none" if model is None else repr(model)
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece), got {given}"
        )
    tokens = _required(where, metadata, "tokenizer.ggml.tokens", StringArray)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = np.full(len(tokens), NORMAL)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type: expected {len(tokens)} integers, one per token")
    if model == "gpt2":
        return _byte_level(where, metadata, tokens, kinds)

    def build() -> Tokenizer:
        return _sentencepiece(where, metadata, tokens, kinds)

    if "tokenizer.ggml.merges" in metadata:
        return build()
    # Deriving the merges takes seconds for a large vocabulary; everything else is built as fast as it is read back.
    return _cached(f"tokenizers {tokenizers.__version__}", metadata, build)


def _required(where: str, metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(key)
    if not isinstance(value, kind) or not len(value):
        expected = "strings" if kind is StringArray else "numbers"
        given = "nothing" if value is None else type(value).__name__
        raise CheckpointError(f"{where}: {key}: expected an array of {expected}, got {given}")
    return value


def token_id(where: str, metadata: Mapping[str, Any], name: str) -> int | None:
    """The id under tokenizer.ggml.<name>_token_id, None if there is none. Raises `CheckpointError` if out of range."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    count = len(metadata["tokenizer.ggml.tokens"])
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{where}: {key}: expected an id below {count}, got {value!r}")
    if value == 0xFFFFFFFF:  # how some converters write "none"
        return None
    if not 0 <= value < count:
        raise CheckpointError(f"{where}: {key}: expected an id below {count}, got {value!r}")
    return value


def end_ids(where: str, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a generation: EOS first, then end of turn and of message, by key or by their text."""
    found = [token_id(where, metadata, name) for name in ("eos", "eot", "eom")]
    kinds, tokens = metadata.get("tokenizer.ggml.token_type"), metadata["tokenizer.ggml.tokens"]
    if kinds is not None:
        control = np.flatnonzero(np.asarray(kinds) == CONTROL).tolist()
        found += [i for i in control if i < len(tokens) and tokens[i] in END_OF_TURN]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def adds(metadata: Mapping[str, Any], which: str) -> bool:
    """Whether encoding adds `which`, "bos" or "eos". Files that do not say mean what llama.cpp takes for granted."""
    flag = metadata.get(f"tokenizer.ggml.add_{which}_token")
    if isinstance(flag, bool):
        return flag
    if which == "eos":
        return False
    return (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in LLAMA3_FAMILY
    )


def _merges(where: str, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(_required(where, metadata, "tokenizer.ggml.merges", StringArray)):
        left, space, right = merge.partition(" ")
        if not space:
            raise CheckpointError(f"{where}: tokenizer.ggml.merges: element {i}: expected two pieces, got {merge!r}")
        merges.append((left, right))
    return merges


def _bpe(where: str, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import models

    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the package raises bare Exception, for merges of pieces outside the vocabulary
        raise CheckpointError(f"{where}: tokenizer.ggml.merges: expected pieces of the vocabulary: {error}") from error


def _byte_level(where: str, metadata: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre: expected one of {', '.join(PRE_TOKENIZERS)}, got {pre!r}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(_bpe(where, vocab, _merges(where, metadata), ignore_merges=pre in LLAMA3_FAMILY))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in PRE_TOKENIZERS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    _finish(backend, where, metadata, tokens, kinds)
    return backend


def _sentencepiece(
    where: str, metadata: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers

    pieces = list(tokens)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(where, metadata)
    else:
        scores = _required(where, metadata, "tokenizer.ggml.scores", np.ndarray)
        if len(scores) != len(pieces) or not np.isfinite(scores).all():
            raise CheckpointError(
                f"{where}: tokenizer.ggml.scores: expected {len(pieces)} finite numbers, one per token"
            )
        merges = derive_merges(pieces, scores, kinds)
    unknown = token_id(where, metadata, "unknown")
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    backend = Tokenizer(_bpe(
        where, vocab, merges, fuse_unk=True, byte_fallback=has_bytes,
        unk_token=None if unknown is None else pieces[unknown],
    ))  # fmt: skip
    prefix = metadata.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(content=" ", left=1)] if prefix else []),
    ])  # fmt: skip
    _finish(backend, where, metadata, pieces, kinds)
    return backend


def derive_merges(pieces: Sequence[str], scores: np.ndarray, kinds: np.ndarray) -> list[tuple[str, str]]:
    """The merges that a vocabulary of scored pieces implies: SentencePiece joins the neighbours whose union has the
    highest score, so every way to cut a piece into two others is a merge, in the order of the pieces' scores."""
    usable = {piece for piece, kind in zip(pieces, kinds.tolist(), strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for i in np.argsort(-scores, kind="stable").tolist():
        piece = pieces[i]
        if piece not in usable:
            continue
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((left, right))
    return merges


def _finish(
    backend: Tokenizer, where: str, metadata: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray
) -> None:
    """Tokens that are matched whole in the text, and those that encoding adds around it."""
    from tokenizers import AddedToken, processors

    def added(kinds_wanted: Iterable[int], special: bool) -> list[AddedToken]:
        chosen = (tokens[i] for i in np.flatnonzero(np.isin(kinds, list(kinds_wanted))).tolist())
        return [AddedToken(token, normalized=False, special=special) for token in chosen if token]

    backend.add_special_tokens(added((CONTROL, UNKNOWN), True))
    backend.add_tokens(added((USER_DEFINED,), False))
    ends = {which: token_id(where, metadata, which) for which in ("bos", "eos") if adds(metadata, which)}
    around = {which: (tokens[i], i) for which, i in ends.items() if i is not None}
    if around:
        names = [around["bos"][0]] if "bos" in around else []
        names += ["$A"]
        names += [around["eos"][0]] if "eos" in around else []
        backend.post_processor = processors.TemplateProcessing(
            single=names, pair=[*names, *(f"{n}:1" if n != "$A" else "$B:1" for n in names)],
            special_tokens=list(dict.fromkeys(around.values())),
        )  # fmt: skip


# The cache: <folder>/<digest of the metadata>.json, a line with the digest of the rest, then the tokenizer's own JSON.
FORMAT = b"qkernels tokenizer 1"  # to be raised when the same metadata build something else


def cache_folder() -> Path | None:
    """Where built tokenizers are kept; None with QKERNELS_CACHE=0."""
    if os.environ.get("QKERNELS_CACHE") == "0":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qkernels" / "tokenizers"


def _digest(builder: str, metadata: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(FORMAT + builder.encode(), digest_size=20)
    for key in sorted(metadata):
        if not key.startswith("tokenizer.ggml."):
            continue
        value = metadata[key]
        if isinstance(value, StringArray):
            stored = value.stored()
        elif isinstance(value, np.ndarray):
            stored = value.dtype.str.encode() + value.tobytes()
        else:
            stored = repr(value).encode()
        digest.update(f"{key} {len(stored)} ".encode())
        digest.update(stored)
    return digest.hexdigest()


def _cached(builder: str, metadata: Mapping[str, Any], build: Any) -> Tokenizer:
    """build(), or what it made for the same metadata before."""
    from tokenizers import Tokenizer

    folder = cache_folder()
    if folder is None:
        return build()
    path = folder / f"{_digest(builder, metadata)}.json"
    try:
        check, _, text = path.read_bytes().partition(b"\n")
    except OSError:
        check, text = b"", b""
    if text and check == hashlib.blake2b(text, digest_size=20).hexdigest().encode():
        return Tokenizer.from_str(text.decode())
    backend = build()
    text = backend.to_str().encode()
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                file.write(hashlib.blake2b(text, digest_size=20).hexdigest().encode() + b"\n" + text)
                file.close()
                os.replace(file.name, path)  # whole or not at all
            except BaseException:
                os.unlink(file.name)
                raise
    return backend
