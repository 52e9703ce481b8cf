"""attn_implementation="qkernels" inside stock transformers models, against sdpa or eager."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hf_tiny import CONFIGS, TINY, TRUTH, batch, generate, tiny
from transformers import masking_utils

import qkernels as qk
import qkernels.hf as hf
from qkernels.hf import attention, masks

# Two float32 orders of summation over 2 layers of unit-sized activations.
CLOSE: dict[str, float] = {"atol": 5e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def no_slow_path() -> Iterator[None]:
    """Where a test does not expect it, plain torch must not serve."""
    attention._told.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.SlowAttentionWarning)
        yield


def both(
    model: Any, run: Callable[[Any], torch.Tensor], truth: str = "sdpa"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What run(model) gives with the implementation `truth`, and with ours."""
    out = []
    for name in (truth, hf.ATTENTION):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out.append(run(model))
    return out[0], out[1]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case: str, padding: str) -> None:
    ids, mask = batch(padding)
    theirs, ours = both(
        tiny(case), lambda m: m(ids, attention_mask=mask).logits, TRUTH.get(case, "sdpa")
    )
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("case", CONFIGS)
def test_generated_tokens(case: str, padding: str) -> None:
    theirs, ours = both(tiny(case), lambda m: generate(m, padding), TRUTH.get(case, "sdpa"))
    assert torch.equal(theirs, ours)


def test_the_caches_of_transformers() -> None:
    model = tiny("gemma3")
    model.set_attn_implementation("sdpa")
    truth = generate(model, "left")
    model.set_attn_implementation(hf.ATTENTION)
    for room in (48, 41):  # whole pages, and not
        cache = transformers.StaticCache(model.config, max_cache_len=room)
        assert torch.equal(generate(model, "left", past_key_values=cache), truth)
    model.set_attn_implementation("sdpa")
    truth = generate(model, "none", num_beams=2)
    model.set_attn_implementation(hf.ATTENTION)
    assert torch.equal(generate(model, "none", num_beams=2), truth)


def test_a_prompt_in_parts() -> None:
    ids, mask = batch("left")

    def parts(model: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        logits = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 9), (9, 14), (14, 20))
        ]
        return torch.cat(logits, 1)[mask.bool()]

    theirs, ours = both(tiny("mistral"), parts)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_tokens_after_right_padding() -> None:
    """Padding between tokens is left out of the keys, except with a window, where it counts."""
    ids, mask = batch("right")

    def turns(model: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        whole = torch.cat((mask, torch.ones(3, 2, dtype=mask.dtype)), 1)
        one = model(ids[:, :1], attention_mask=whole[:, :-1], past_key_values=cache).logits
        return torch.cat(
            (one, model(ids[:, 1:2], attention_mask=whole, past_key_values=cache).logits), 1
        )

    theirs, ours = both(tiny("llama"), turns)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    with pytest.warns(hf.SlowAttentionWarning, match="padding between the tokens"):
        theirs, ours = both(tiny("mistral"), turns)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_packed_sequences_stay_apart() -> None:
    ids, _ = batch("none")
    positions = torch.tensor([[*range(7), *range(13)], [*range(20)], [0, *range(19)]])
    for case in ("llama", "mistral"):
        theirs, ours = both(
            tiny(case), lambda m: m(ids, position_ids=positions, use_cache=False).logits
        )
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_any_other_mask_is_served_and_said_once() -> None:
    ids, _ = batch("none")
    prefix = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    prefix[..., :5] = True
    model = tiny("llama")

    def logits(of: Any) -> torch.Tensor:
        return of(ids, attention_mask=prefix, use_cache=False).logits  # type: ignore[no-any-return]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", hf.SlowAttentionWarning)
        theirs, ours = both(model, logits)
        logits(model.eval().requires_grad_(False))
    said = [w for w in told if issubclass(w.category, hf.SlowAttentionWarning)]
    assert len(said) == 1 and "exact, but slow" in str(said[0].message)
    torch.testing.assert_close(ours, theirs, **CLOSE)


ENCODER = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_encoders(padding: str) -> None:
    ids, mask = batch(padding)
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**ENCODER), add_pooling_layer=False)
    theirs, ours = both(bert.eval(), lambda m: m(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(ours, theirs, **CLOSE)  # queries of padding are computed too
    modern = transformers.ModernBertConfig(
        **ENCODER, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0
    )
    model = transformers.ModernBertModel(modern).eval()
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_t5_and_its_bias_by_distance(padding: str) -> None:
    ids, mask = batch(padding)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=160,
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    theirs, ours = both(
        model, lambda m: m(ids, attention_mask=mask, decoder_input_ids=ids[:, :9]).logits
    )
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)  # scores are not scaled
    theirs, ours = both(model, lambda m: generate(m, padding, 8, num_beams=2))
    assert torch.equal(theirs, ours)


def test_whisper_and_cross_attention() -> None:
    sizes = {
        f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("attention_heads",)
    }
    config = transformers.WhisperConfig(
        **sizes,
        vocab_size=160,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=40,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sound = torch.randn(2, 16, 80)
    ids = batch("none")[0][:2, :9]
    theirs, ours = both(model, lambda m: m(sound, decoder_input_ids=ids).logits)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_heads_that_the_kernels_do_not_take_are_widened() -> None:
    config = transformers.LlamaConfig(**{**TINY, "head_dim": 24})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, mask = batch("left")
    with pytest.warns(hf.SlowAttentionWarning, match="heads of 24 dims"):
        theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).logits)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)


def test_biases_that_are_not_by_distance() -> None:
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    bias = torch.randn(1, 4, 9, 9)
    with pytest.warns(hf.SlowAttentionWarning, match="no function of the distance"):
        ours, _ = hf.qkernels_attention(
            torch.nn.Module(), q, k, v, None, is_causal=False, position_bias=bias
        )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(ours, want.transpose(1, 2), **CLOSE)


def test_without_a_mask_as_sdpa_does() -> None:
    module = torch.nn.Module()
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 8)
    wide = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    ours, weights = hf.qkernels_attention(module, q, k, v, None, is_causal=False)
    torch.testing.assert_close(ours, wide.transpose(1, 2), **CLOSE)
    assert weights is None and ours.shape == (2, 5, 4, 8)
    first = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, :5], v[:, :, :5], is_causal=True, enable_gqa=True
    )
    ours, _ = hf.qkernels_attention(module, q, k, v, None, is_causal=True)
    torch.testing.assert_close(ours, first.transpose(1, 2), **CLOSE)


def test_refusals_say_what_to_use() -> None:
    model = tiny("llama")
    model.set_attn_implementation(hf.ATTENTION)
    ids, mask = batch("none")
    with pytest.raises(ValueError, match=r"no backward: .*set_attn_implementation\(\"sdpa\"\)"):
        model(ids)
    q = torch.randn(1, 4, 5, 16)

    def refused(words: str, mask: Any = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            hf.qkernels_attention(torch.nn.Module(), q, q, q, mask, **options)

    refused("has no dropout, got 0.1", dropout=0.1)
    refused("no attention weights", output_attentions=True)
    refused("takes no head_mask", head_mask=torch.ones(4))
    refused(r"must be \[B, 1, T, S\].*got \[1, 5\]", mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="of 2 sequences, the input of 3"), torch.no_grad():
        model(ids, attention_mask=mask[:2])
    seen = masks.SeenKeys((1, 5, 5), causal=True)
    for use in (lambda: seen[..., :3], lambda: seen + 1, lambda: 1.0 * seen):
        with pytest.raises(TypeError, match="attn_implementation='sdpa'"):
            use()


def packed_mask(function: Any, positions: torch.Tensor, ids: torch.Tensor) -> Any:
    """As transformers makes it, in versions that count positions anew in each sequence or not."""
    if make := getattr(masking_utils, "packed_sequence_compatibility_function", None):
        return make(function, positions, ids)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))


def test_masks_are_recognized_by_their_parts() -> None:
    """What transformers composes masks of has not changed its names."""
    made = masking_utils
    causal, window = made.causal_mask_function, made.sliding_window_causal_mask_function(7)
    assert masks.parts_of(causal) == {"causal": True}
    assert masks.parts_of(window) == {"causal": True, "window": 7}
    assert masks.parts_of(made.bidirectional_mask_function) == {}
    assert masks.parts_of(made.sliding_window_bidirectional_mask_function(7)) == {"reach": 7}
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for mask in (
        packed_mask(window, ids, ids),
        made.and_masks(window, made.packed_sequence_mask_function(ids)),
    ):
        packed = masks.parts_of(mask)
        assert packed is not None and packed.pop("packed") is ids
        assert packed.pop("remapped", True) and packed == {"causal": True, "window": 7}
    chunks = made.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    either = made.or_masks(causal, made.bidirectional_mask_function)
    for unknown in (chunks, either, lambda b, h, q, k: k <= q, made.and_masks(causal, either)):
        assert masks.parts_of(unknown) is None


@pytest.mark.parametrize("parts", ["causal", "window", "reach", "packed"])
def test_a_description_is_the_mask_of_sdpa(parts: str) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]] * 2)
    function = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(3),
        "reach": masking_utils.sliding_window_bidirectional_mask_function(2),
        "packed": packed_mask(masking_utils.causal_mask_function, positions, ids),
    }[parts]
    mask = torch.tensor([[False] * 2 + [True] * 7, [True] * 9])
    given: dict[str, Any] = {"batch_size": 2, "q_length": 9, "kv_length": 9}
    given |= {"mask_function": function, "attention_mask": mask}
    seen = masks.seen_keys(**given)
    assert isinstance(seen, masks.SeenKeys)
    want = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(seen.dense(torch.device("cpu")), want)


def test_t5_biases_are_those_of_its_table() -> None:
    table = torch.randn(8, 4)
    by = qk.ops.position_bias.t5_distance_bias(table, bidirectional=True, max_distance=16)
    distance = torch.arange(9)[None] - torch.arange(3, 9)[:, None]
    ours = attention.by_distance(by[:, distance + 16][None], offset=3)
    assert torch.equal(ours[:, : 8 + 6], by[:, 16 - 8 : 16 + 6])  # distances of -8 to 5
    assert attention.by_distance(torch.zeros(1, 4, 6, 9), 3) is None
    assert attention.by_distance(torch.randn(1, 4, 6, 9), 3) is False
    assert attention.by_distance(by[:, distance + 16][None].repeat(2, 1, 1, 1), 3) is False


def test_the_name_is_registered_and_importing_takes_no_transformers() -> None:
    assert hf.ATTENTION in transformers.AttentionInterface().valid_keys()
    with pytest.raises(AttributeError, match=re.escape("has no attribute 'Attention'")):
        _ = hf.Attention
