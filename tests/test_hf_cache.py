"""QuantizedStaticCache inside stock transformers: tokens, lengths, padding, beams, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hf_tiny import CONFIGS, TINY, TRUTH, batch, generate, tiny

import qkernels.hf as hf
from qkernels.hf.cache import PAGE, QuantizedStaticCache
from qkernels.ops.attention import kv_append
from qkernels.reference.attention import read_pages

ROOM = 40


def cache_for(model: Any, dtype: str = "float32", room: int = ROOM) -> QuantizedStaticCache:
    return hf.QuantizedStaticCache(model.config, room, dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("case", CONFIGS)
def test_tokens_are_those_of_the_float_cache(case: str, padding: str) -> None:
    model = tiny(case)
    model.set_attn_implementation(TRUTH.get(case, "sdpa"))
    truth = generate(model, padding)
    # Another attention gets floats, and masks padding itself.
    assert torch.equal(generate(model, padding, past_key_values=cache_for(model)), truth)
    model.set_attn_implementation(hf.ATTENTION)
    cache = cache_for(model)
    assert torch.equal(generate(model, padding, past_key_values=cache), truth)
    stored = [layer.kv_len.tolist() for layer in cache.layers]
    dropped = [7, 2, 0] if padding == "left" else [0, 0, 0]
    assert stored == [[31 - n for n in dropped]] * 2  # padding takes no room
    assert int(cache.get_seq_length()) == 31


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_what_is_stored_is_what_the_op_stores(dtype: str) -> None:
    """Logits with our attention equal those of an sdpa that reads the same numbers."""
    model = tiny("gemma3")
    ids, mask = batch("none")

    def logits(name: str) -> torch.Tensor:
        model.set_attn_implementation(name)
        cache = cache_for(model, dtype)
        with torch.no_grad():
            parts = [
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in ((0, 12), (12, 19), (19, 20))
            ]
        return torch.cat(parts, 1)

    torch.testing.assert_close(logits(hf.ATTENTION), logits("sdpa"), atol=5e-6, rtol=1e-5)
    assert not torch.equal(logits("sdpa"), model(ids, attention_mask=mask).logits)


def test_read_gives_what_the_pages_hold() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config._attn_implementation = "sdpa"
    layer = QuantizedStaticCache(config, 2 * PAGE + 5, "int4").layers[1]
    keys, values = torch.randn(2, 2, 2, 100, 16).unbind(0)
    layer.update(keys[:, :, :70], values[:, :, :70])
    read, _ = layer.update(keys[:, :, 70:], values[:, :, 70:])
    assert read.shape == (2, 2, 2 * PAGE + 5, 16) and not read[:, :, 100:].any()
    for b in range(2):
        want = read_pages(layer.k_pages, layer.k_scale, layer.page_table[b], 100, 16)
        assert torch.equal(read[b, :, :100].transpose(0, 1), want)
    # and the pages hold what kv_append alone writes
    pages = [torch.zeros_like(t) for t in layer.pages]
    rows = [x.transpose(1, 2).reshape(200, 2, 16).contiguous() for x in (keys, values)]
    starts = torch.tensor([0, 100, 200], dtype=torch.int32)
    table, length = layer.page_table, torch.tensor([100, 100], dtype=torch.int32)
    kv_append(rows[0], *rows, None, None, starts, length, table, *pages)
    assert all(torch.equal(a, b) for a, b in zip(pages, layer.pages, strict=True))


def test_prompts_in_parts_with_padding() -> None:
    ids, mask = batch("left")
    model = tiny("gemma3")

    def logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            parts = [
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in ((0, 5), (5, 14), (14, 20))
            ]
        return torch.cat(parts, 1)[mask.bool()]

    truth = logits(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation(hf.ATTENTION)
    torch.testing.assert_close(logits(cache_for(model)), truth, atol=5e-6, rtol=1e-5)


def test_tokens_after_right_padding() -> None:
    ids, mask = batch("right")
    model = tiny("llama")
    whole = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1)

    def next_logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            out: torch.Tensor = model(
                ids[:, :1], attention_mask=whole, past_key_values=cache
            ).logits
        return out

    truth = next_logits(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation(hf.ATTENTION)
    torch.testing.assert_close(next_logits(cache_for(model)), truth, atol=5e-6, rtol=1e-5)


def test_beams_and_several_answers() -> None:
    model = tiny("gemma3")
    options = {"num_beams": 3, "num_return_sequences": 2}
    truth = generate(model, "left", **options)
    model.set_attn_implementation(hf.ATTENTION)
    cache = cache_for(model)
    assert torch.equal(generate(model, "left", past_key_values=cache, **options), truth)
    assert cache.batch_size == 9


def test_reset_and_crop_give_the_same_again() -> None:
    model = tiny("gemma3")
    model.set_attn_implementation(hf.ATTENTION)
    cache = cache_for(model, "int8")
    first = generate(model, "left", past_key_values=cache)
    addresses = [t.data_ptr() for layer in cache.layers for t in layer.pages]
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and not cache.layers[0].k_pages.any()
    assert torch.equal(generate(model, "left", past_key_values=cache), first)
    assert addresses == [t.data_ptr() for layer in cache.layers for t in layer.pages]
    # Back to the prompt, but for its last token: `generate` goes on from there.
    cache.crop(-(int(cache.get_seq_length()) - 20))
    assert int(cache.get_seq_length()) == 20
    _, mask = batch("left")
    with torch.no_grad():
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(first[:, 20:21], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(logits[:, -1].argmax(-1), first[:, 21])
    other = copy.deepcopy(cache)
    cache.reset()
    assert int(other.get_seq_length()) == 21


def test_sizes() -> None:
    cache = hf.QuantizedStaticCache(CONFIGS["gemma3"], 100, "int8")
    assert cache.nbytes == 0 and cache.batch_size == -1 and not cache.is_initialized
    cache.early_initialization(2, 2, 16, torch.bfloat16, torch.device("cpu"))
    # 2 layers, 2 sequences in whole pages, 2 heads of keys and values: codes, scale and zero point
    assert cache.nbytes == 2 * 2 * 128 * 2 * 2 * (16 + 4)
    assert cache.nbytes == sum(t.nbytes for layer in cache.layers for t in layer.pages)
    assert cache.get_max_cache_shape() == cache.get_max_length() == 100
    assert cache.is_sliding == [True, False] and cache.is_compileable and cache.is_initialized
    assert cache.get_mask_sizes(5, 0) == (100, 0)


def test_arguments_are_checked() -> None:
    config = CONFIGS["llama"]
    with pytest.raises(ValueError, match=r"one of float32, .*int4, got 'int3'"):
        hf.QuantizedStaticCache(config, 10, "int3")
    with pytest.raises(ValueError, match="max_cache_len must be at least 1, got 0"):
        hf.QuantizedStaticCache(config, 0)
    chunks = transformers.Llama4TextConfig(**TINY, attention_chunk_size=8)
    with pytest.raises(ValueError, match="this model has chunked_attention"):
        hf.QuantizedStaticCache(chunks, 10)
    odd = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**TINY, "head_dim": 24})
    )
    with pytest.raises(ValueError, match="a multiple of 16 up to 512, got 24 and 24"):
        generate(odd.eval(), "none", past_key_values=cache_for(odd))


@pytest.mark.parametrize("name", ["sdpa", "qkernels"])
def test_a_full_cache_and_another_batch(name: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(hf.ATTENTION)
    model.set_attn_implementation(name)
    cache = cache_for(model, room=22)
    with pytest.raises(ValueError, match=r"holds 22 tokens .*max_cache_len = 22; 1 more"):
        generate(model, "none", past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="it holds 3 sequences, got 1"), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)


def test_misuse_is_refused() -> None:
    model = tiny("llama")
    model.set_attn_implementation(hf.ATTENTION)
    ids, mask = batch("left")
    whole = torch.nn.functional.pad(mask, (0, 1), value=1)

    def more(cache: Any, mask: Any) -> None:
        with torch.no_grad():
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)

    cache = cache_for(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"shows \[20, 20, 20\] past tokens.*\[13, 18, 20\]"):
        more(cache, None)
    with pytest.raises(ValueError, match=r"shows \[12, 18, 20\] past tokens"):
        hidden = whole.clone()
        hidden[0, 10] = 0
        more(cache, hidden)
    with pytest.raises(ValueError, match="2 of 20 tokens cannot be removed, those before 20"):
        cache.crop(-2)
    with pytest.raises(ValueError, match=r"crop takes the negative number .* got 3"):
        cache.crop(3)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"another attention implementation.*reset\(\)"):
        more(cache, whole)
    model.set_attn_implementation(hf.ATTENTION)
    for call in (cache.batch_repeat_interleave, cache.batch_select_indices):
        with pytest.raises(NotImplementedError, match="number of its sequences is fixed"):
            call(2)
    keys, _ = cache.layers[0].update(torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16))
    assert keys.shape == (3, 2, ROOM, 16) and keys.dtype == torch.float32
    with pytest.raises(AttributeError, match=r"'transpose'.*use it with attn_implementation"):
        keys.transpose(1, 2)
    with pytest.raises(AttributeError, match="computes with the keys"):
        keys[:, :, :3]
