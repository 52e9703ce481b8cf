"""Parts of `qkernels serve` without a server: what requests may ask for, the host, models in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_writer import write_llama

transformers = pytest.importorskip("transformers", reason="the server is that of transformers")
pytest.importorskip("fastapi", reason="the server needs the extra [serve]")

from families import family_of  # noqa: E402
from test_hf_models import CASES, random_model  # noqa: E402

import qkernels as qk  # noqa: E402
from qkernels.hf.configs import host_config  # noqa: E402
from qkernels.hf.packed_model import packed_model  # noqa: E402
from qkernels.hf.serve import host as serve_host  # noqa: E402
from qkernels.hf.serve.errors import RequestError  # noqa: E402
from qkernels.hf.serve.model import served_model  # noqa: E402
from qkernels.hf.serve.requests import check_body, fit_length, sampled  # noqa: E402
from qkernels.hf.versions import HostVersionError  # noqa: E402
from qkernels.models import UnsupportedModelError  # noqa: E402

# Requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_requests_that_cannot_be_answered(body: dict[str, Any], param: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}], "n": 1, "presence_penalty": 0}
    check_body(good, chat=True)
    with pytest.raises(RequestError) as caught:
        check_body({**good, **body}, chat=True)
    assert (caught.value.status_code, caught.value.param) == (400, param)


def test_completions_need_a_prompt() -> None:
    check_body({"prompt": "x"}, chat=False)
    for prompt in (None, "", ["x"]):
        with pytest.raises(RequestError, match="prompt"):
            check_body({"prompt": prompt}, chat=False)


def test_answers_fit_the_context() -> None:
    settings = transformers.GenerationConfig(max_new_tokens=100)
    fit_length(torch.zeros(1, 30), settings, 64)
    assert settings.max_new_tokens == 34
    fit_length([1] * 10, settings, 64)
    assert settings.max_new_tokens == 34
    for length in (0, 64, 100):
        with pytest.raises(RequestError):
            fit_length([1] * length, settings, 64)


def test_a_temperature_asks_for_sampling() -> None:
    for body, wanted in (({}, False), ({"temperature": 0.5}, True), ({"top_p": 0.5}, True)):
        settings = transformers.GenerationConfig(do_sample=False)
        sampled(body, settings)
        assert bool(settings.do_sample) is wanted
    settings = transformers.GenerationConfig(do_sample=True)
    sampled({"temperature": 0}, settings)
    assert settings.do_sample is False


# The host, and models in it


def test_the_parts_of_the_host_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = serve_host.parts()
    monkeypatch.delattr(found["ModelManager"], "_load_processor")
    with pytest.raises(HostVersionError, match=r"no ModelManager\._load_processor"):
        serve_host.parts()
    monkeypatch.undo()
    monkeypatch.setitem(serve_host._METHODS, "build_server", ("no_such_argument",))
    with pytest.raises(HostVersionError, match="no_such_argument"):
        serve_host.parts()
    monkeypatch.undo()
    monkeypatch.setitem(serve_host._MODULES, "no_such_module", ("x",))
    with pytest.raises(HostVersionError, match="no_such_module"):
        serve_host.parts()


@pytest.mark.parametrize("case", CASES)
def test_configurations_say_the_same_model(case: str) -> None:
    raw = CASES[case].to_dict()
    family = qk.models.family_of_hf(raw["model_type"])
    config = family.from_hf(raw)
    assert family_of(config) is family
    try:
        made = host_config(family, config)
    except UnsupportedModelError as error:  # no configuration of transformers has a bias like this
        assert "qwen" in case and "bias" in str(error)
        return
    again = family.from_hf(made.to_dict())
    assert replace(again, family=config.family, attention_scale=config.attention_scale) == config


def test_factors_that_no_configuration_says() -> None:
    family = qk.models.family_of_hf("llama")
    config = family.from_hf(CASES["llama-tied"].to_dict())
    half = config.rope.dim // 2
    rope = replace(config.rope, factors=tuple(1.0 + i for i in range(half)))
    with pytest.raises(UnsupportedModelError, match="rope"):
        host_config(family, replace(config, rope=rope))


def check_logits(path: Path, **options: Any) -> Any:
    model, tokenizer = packed_model(path, act="float", **options)
    decoder = qk.QuantDecoder.from_pretrained(
        path, device="cpu", act="float", kv_dtype="float32", max_seq_len=64, **options
    )
    ids = torch.tensor([[1, 5, 77, 30, 12, 9]])
    with torch.no_grad():
        ours = model(ids).logits
    theirs = decoder(ids).logits
    assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()
    return model, tokenizer


@pytest.mark.parametrize("output", [None, "Q6_K"])
def test_a_model_has_the_weights_of_its_file(output: str | None, tmp_path: Path) -> None:
    sizes = {"layers": 1, "hidden": 256, "vocab": 280}
    model, tokenizer = check_logits(write_llama(tmp_path / "m.gguf", output=output, **sizes))
    table, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(table, qk.nn.QuantEmbedding) and isinstance(head, qk.nn.QuantLinear)
    assert (head.weight is table.weight) is (output is None)
    assert isinstance(model.model.layers[0].mlp.up_proj, qk.nn.QuantLinear)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize(("case", "spec"), [("llama", "MXFP4"), ("qwen2", None), ("gemma3", None)])
def test_a_model_of_a_directory(case: str, spec: str | None, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        packed_model(tmp_path)
    write_tokenizer(tmp_path, CASES[case].vocab_size)
    check_logits(tmp_path, **({} if spec is None else {"spec": spec}))


def write_tokenizer(folder: Path, vocab: int) -> None:
    tokens = {f"<{i}>": i for i in range(vocab)}
    fast = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "<0>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(fast))


@pytest.mark.filterwarnings("ignore:quantize_")
def test_a_model_of_another_family(tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 96)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(ValueError, match="--spec"):
        served_model(tmp_path)
    served = served_model(tmp_path, spec="MXFP4")
    assert served.limit == 64 and "transformers" in served.runs
    assert isinstance(served.model.transformer.h[0].mlp.c_fc, qk.nn.QuantLinear)
    assert served.tokenizer.vocab_size == 96
