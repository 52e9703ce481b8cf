"""A step of decoding through replaced layers, without what the host does around them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_hf_layers import GREEDY, quantized, replaced
from test_hf_models import CASES, TINY, prompt

import qkernels as qk

transformers = pytest.importorskip("transformers", reason="the layers are those of transformers")

from qkernels.hf.layers.forward import DecoderForward  # noqa: E402


@contextmanager
def host_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens that went through the host's own forward of the decoder."""
    decoder = model.get_decoder()
    theirs, counts = type(decoder).forward, []

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        counts.append(given.shape[1])
        return theirs(self, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(type(decoder), "forward", forward)
        yield counts


def without(model: Any) -> Any:
    """The model with the host's forward for every step."""
    assert isinstance(model.get_decoder().forward, DecoderForward)
    del model.get_decoder().forward
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_are_those_of_the_hosts_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(case)
    ours, slow = replaced(model), without(replaced(model))
    ids = prompt()[:1, :40]
    asked = {**GREEDY, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    with host_calls(ours, monkeypatch) as counts:
        out = ours.generate(ids, **asked)
    assert counts == [40]
    with host_calls(slow, monkeypatch) as counts:
        wanted = slow.generate(ids, **asked)
    assert counts == [40] + [1] * 11
    assert torch.equal(out.sequences, wanted.sequences)
    assert all(map(torch.equal, out.logits, wanted.logits))


@torch.no_grad()
def test_with_padding_and_beams() -> None:
    model = quantized("llama-tied")
    ours, slow = replaced(model), without(replaced(model))
    ids = prompt()[:, :20].clone()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}):
        made = []
        for each in (ours, slow):
            torch.manual_seed(0)
            asked = {**GREEDY, **options, "attention_mask": mask, "max_new_tokens": 8}
            made.append(each.generate(ids, **asked))
        assert torch.equal(*made), options


@torch.no_grad()
def test_what_the_host_has_to_see_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replaced(quantized("llama-tied"))
    decoder = ours.get_decoder()
    ids = prompt()[:1, :9]
    cache = ours(ids).past_key_values
    token = ids[:, :1]

    def step(**named: Any) -> tuple[Any, list[int]]:
        with host_calls(ours, monkeypatch) as counts:
            out = decoder(past_key_values=cache, **{"input_ids": token, **named})
        cache.crop(-1)
        return out, counts

    plain, counts = step()
    assert counts == [] and plain.hidden_states is None and plain.past_key_values is cache
    assert step(output_hidden_states=False, return_dict=True, use_cache=True)[1] == []
    out, counts = step(output_hidden_states=True)
    assert counts == [1] and len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    out, counts = step(return_dict=False)
    assert counts == [1] and isinstance(out, tuple)
    out, counts = step(input_ids=None, inputs_embeds=decoder.embed_tokens(token))
    assert counts == [1] and torch.equal(out.last_hidden_state, plain.last_hidden_state)
    decoder.config.return_dict = False
    assert isinstance(step()[0], tuple)
    decoder.config.return_dict = True
    decoder.config.output_hidden_states = True
    assert step()[1] == [1]
    decoder.config.output_hidden_states = False
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 10\]"):
        step(attention_mask=torch.ones(1, 4))
    assert cache.get_seq_length() == 9 and torch.equal(step()[0][0], plain[0])


@torch.no_grad()
def test_hooks_around_the_layers_are_called_once() -> None:
    ours = replaced(quantized("llama-tied"))
    decoder = ours.get_decoder()
    ids = prompt()[:1, :9]
    cache = ours(ids).past_key_values
    seen: list[str] = []
    for name in ("embed_tokens", "norm"):
        module = getattr(decoder, name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    decoder.register_forward_hook(lambda *_: seen.append("decoder"))
    for named in ({}, {"output_hidden_states": True}):
        seen.clear()
        ours(ids[:, :1], past_key_values=cache, **named)
        assert seen == ["embed_tokens", "norm", "decoder"], named
    decoder.layers[1].register_forward_hook(lambda *_: seen.append("layer"))
    seen.clear()
    ours(ids[:, :1], past_key_values=cache)
    assert seen == ["embed_tokens", "layer", "norm", "decoder"]


@torch.no_grad()
def test_layers_that_are_no_more_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replaced(quantized("llama-tied"))
    decoder = ours.get_decoder()
    other = copy.deepcopy(ours)
    assert other.get_decoder().forward.decoder is other.get_decoder()
    ids = prompt()[:1, :9]
    cache = ours(ids).past_key_values
    wanted = ours(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(list(layers))  # one by one
    with host_calls(ours, monkeypatch) as counts:
        near = ours(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert counts == [1] and torch.allclose(near, wanted, atol=1e-4)
    decoder.layers = layers
    decoder.config.num_hidden_layers -= 1
    with host_calls(ours, monkeypatch) as counts:
        fewer = ours(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert counts == [1] and not torch.allclose(fewer, wanted, atol=1e-2)


def test_a_forward_of_somebody_else_stays() -> None:
    model = quantized("llama-tied")
    decoder = model.get_decoder()
    theirs = decoder.forward
    decoder.forward = lambda *args, **named: theirs(*args, **named)
    hooked = decoder.forward
    ids = prompt()[:1, :9]
    with torch.no_grad():
        before = model(ids).logits
        qk.replace_decoder_layers_(model, kv_dtype="float32")
        assert decoder.forward is hooked
        assert torch.allclose(model(ids).logits, before, atol=1e-3)
        qk.restore_decoder_layers_(model)
        assert decoder.forward is hooked and torch.equal(model(ids).logits, before)
