"""Decoder layers of transformers models run by ours: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_layers import quantized, replaced
from test_hf_models import CASES, TINY, W8, prompt, random_model

import qkernels as qk
from qkernels.models import UnsupportedModelError

transformers = pytest.importorskip("transformers", reason="the layers are those of transformers")


def test_models_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        qk.replace_decoder_layers_("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"decoder-only language model .* got a? ?Linear"):
        qk.replace_decoder_layers_(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a QuantDecoder runs these programs by itself"):
        qk.replace_decoder_layers_(qk.QuantDecoder.from_pretrained(random_model("llama"), W8))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    with pytest.raises((TypeError, UnsupportedModelError), match="replace_decoder_layers_"):
        qk.replace_decoder_layers_(gpt2)
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(**TINY))
    with pytest.raises(UnsupportedModelError, match="PhiModel: model_type 'phi' is not supported"):
        qk.replace_decoder_layers_(phi)


def test_arguments_and_states_that_are_refused() -> None:
    model = random_model("llama")
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    for error, words, arguments in (
        (ValueError, "act must be auto", {"act": "int4"}),
        (ValueError, "kv_dtype must be auto", {"kv_dtype": "float64"}),
        (ValueError, "max_seq_len 999 exceeds the 256", {"max_seq_len": 999}),
        (TypeError, "embeddings belong to quantize_, and need a spec", {"embeddings": "W8A8"}),
        (ValueError, "scheme", {"spec": "W99"}),
    ):
        with pytest.raises(error, match=words):
            qk.replace_decoder_layers_(model, **arguments)
    model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(ValueError, match=r"rotates by other angles .* inv_freq has been changed"):
        qk.replace_decoder_layers_(model, "W4A8")
    assert model.state_dict()["model.layers.0.mlp.up_proj.weight"] is not None
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model = replaced(random_model("llama"))
    with pytest.raises(ValueError, match="replaced already"):
        qk.replace_decoder_layers_(model)
    mixed = random_model("llama")
    mixed.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"all layers must be on one device, .* cpu, meta"):
        qk.replace_decoder_layers_(mixed)

    class Mine(transformers.LlamaForCausalLM):
        pass

    mine = Mine(CASES["llama"])
    mine.model.layers[0].__class__ = type("Own", (type(mine.model.layers[0]),), {})
    with pytest.raises(TypeError, match=r"expected the classes of transformers.*\.Own"):
        qk.replace_decoder_layers_(mine)


@torch.no_grad()
def test_inputs_that_are_refused() -> None:
    model = quantized("llama")
    ours = replaced(model, max_seq_len=64)
    ids = prompt()[:, :20]

    def refused(words: str, error: type[Exception] = ValueError, **given: Any) -> None:
        with pytest.raises(error, match=words):
            ours(**{"input_ids": ids, **given})

    refused("would have 90 tokens, the replaced layers take 64", input_ids=prompt())
    refused("output_attentions: replaced layers have no", output_attentions=True)
    refused("layers take one of shape", attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
    refused(
        "must be a DynamicCache .* got StaticCache",
        TypeError,
        past_key_values=transformers.StaticCache(config=model.config, max_cache_len=64),
    )
    refused("hold 20 tokens of the host's own", past_key_values=model(ids).past_key_values)
    refused("one by one, padding left out", position_ids=torch.arange(20)[None] * 2)
    packed = torch.cat([torch.arange(10), torch.arange(10)])[None]
    refused("more than causal", position_ids=packed, use_cache=False)
    other = replaced(quantized("gemma3"))(ids).past_key_values
    refused("those of a model with", past_key_values=other)

    cache = ours(ids).past_key_values
    refused("the cache has 2 sequences, got 1", input_ids=ids[:1], past_key_values=cache)
    refused(
        "sequence 0 went on at 20, got 3",
        position_ids=torch.arange(3, 23)[None],
        past_key_values=cache,
    )
    mask = torch.ones(2, 40, dtype=torch.int64)
    refused("must be \\[2, 40\\] here", attention_mask=mask[:, :30], past_key_values=cache)
    mask[0, 3] = 0
    refused("has changed for tokens", attention_mask=mask, past_key_values=cache)
    # None of this has touched the cache.
    assert cache.get_seq_length() == 20
    more = ours(prompt()[:, 20:30], past_key_values=cache).logits
    assert torch.allclose(more, ours(prompt()[:, :30]).logits[:, 20:], atol=2e-5)
    mask[0, :4] = 0
    padded = ours(ids, attention_mask=mask[:, :20]).past_key_values
    refused("attention_mask is missing", past_key_values=padded)
    with pytest.raises(ValueError, match="positive"):
        cache.crop(3)
    with pytest.raises(ValueError, match="31 cannot be removed"):
        cache.crop(-31)
    with pytest.raises(ValueError, match="layer 1 was called with a cache in which layer 0"):
        ours.model.layers[1](torch.zeros(2, 1, 64), past_key_values=cache)
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="belongs to replaced decoder layers"),
    ):
        ours(ids, past_key_values=cache)
