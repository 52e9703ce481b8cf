"""evaluate.perplexity against a direct float64 computation; its text handling and its errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qkernels import PackedWeight, QuantSpec, evaluate
from qkernels.evaluate import (
    Perplexity,
    compare,
    join_lines,
    kl_divergence,
    perplexity,
    window_nats,
)
from qkernels.model_size import ModelSize, model_size
from qkernels.nn import QuantLinear
from qkernels.quant.quantize import quantize_packed


class Bigram:
    """A decoder whose logits are a row of a table chosen by the current token: an exact answer is a
    table lookup.
    """

    def __init__(
        self, vocab: int = 53, dtype: torch.dtype = torch.float32, max_seq_len: int = 64
    ) -> None:
        self.table = (
            torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
        )
        self.max_seq_len = max_seq_len
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> SimpleNamespace:
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])

    @property
    def text(self) -> Bigram:
        return self

    bos_id: int | None = None
    adds_bos = False

    def encode(self, text: str, special: bool = True) -> list[int]:
        bos = [self.bos_id] if special and self.adds_bos and self.bos_id is not None else []
        return bos + [ord(c) % 53 for c in text]


def expected(decoder: Bigram, ids: list[int], window: int, windows: int) -> float:
    logp = torch.log_softmax(decoder.table.double(), -1)
    nats = [
        -logp[a, b].item()
        for w in range(windows)
        for a, b in zip(
            ids[w * window : w * window + window - 1],
            ids[w * window + 1 : (w + 1) * window],
            strict=True,
        )
    ]
    return math.exp(math.fsum(nats) / len(nats))


@pytest.mark.parametrize("window", [2, 3, 64])
@pytest.mark.parametrize("windows", [1, 5])
def test_value(window: int, windows: int) -> None:
    decoder = Bigram()
    ids = torch.randint(0, 53, (window * windows + 7,), generator=torch.Generator().manual_seed(1))
    result = perplexity(decoder, ids, window=window, windows=windows, skip_fraction=0.0)
    # float32 log-softmax: each term is within a few units of 1e-7 of |logit| <= 15.
    assert float(result) == pytest.approx(
        expected(decoder, ids.tolist(), window, windows), rel=5e-6
    )
    assert result.value == pytest.approx(math.exp(result.nats))
    assert result.predictions == windows * (window - 1)
    assert len(result.window_nats) == windows
    assert all(seen.shape == (1, window) for seen in decoder.seen)


def test_uniform_logits_give_the_vocabulary_size() -> None:
    decoder = Bigram(vocab=53)
    decoder.table.zero_()
    assert perplexity(decoder, list(range(53)), window=8, windows=2).value == pytest.approx(
        53.0, rel=1e-6
    )


def test_window_nats_does_not_depend_on_the_block() -> None:
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    ids = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(3))
    direct = -torch.log_softmax(logits.double(), -1)[:-1].gather(1, ids[1:, None]).sum().item()
    assert window_nats(logits, ids) == pytest.approx(direct, rel=1e-6)


def test_the_last_logits_row_predicts_nothing() -> None:
    decoder = Bigram()
    logits, ids = decoder.table[:4].clone(), torch.tensor([0, 1, 2, 3])
    before = window_nats(logits, ids)
    logits[3] = float("nan")
    assert window_nats(logits, ids) == before


def test_join_lines() -> None:
    assert join_lines("a\nb\n\nc\nd\n\n\ne\n") == "a b\n\nc d\n\n\ne "


@pytest.mark.parametrize("length", [10, 99, 290, 1009])
def test_text_starts_at_a_tenth_of_its_characters(length: int) -> None:
    text = "".join(chr(40 + (i * i + i // 7) % 53) for i in range(length))
    decoder = Bigram()
    perplexity(decoder, text, window=3, windows=2)
    start = length // 10
    assert torch.cat(decoder.seen, 1)[0].tolist() == [ord(c) % 53 for c in text[start : start + 6]]


@pytest.mark.parametrize(
    ("adds_bos", "bos", "starts"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_windows_start_with_bos(adds_bos: bool, bos: bool | None, starts: bool) -> None:
    decoder = Bigram()
    decoder.bos_id, decoder.adds_bos = 52, adds_bos
    ids = [i % 50 for i in range(20)]
    result = perplexity(decoder, ids, window=4, windows=3, skip_fraction=0.0, bos=bos)
    want = [[52, 0, 1, 2], [52, 3, 4, 5], [52, 6, 7, 8]] if starts else torch.arange(12).view(3, 4)
    assert torch.equal(torch.cat(decoder.seen), torch.as_tensor(want))
    assert result.predictions == 9
    flat = torch.cat(decoder.seen).flatten().tolist()
    assert float(result) == pytest.approx(expected(decoder, flat, 4, 3), rel=5e-6)


def test_a_bos_in_front_of_ids_is_not_text() -> None:
    decoder = Bigram()
    decoder.bos_id, decoder.adds_bos = 52, True
    perplexity(decoder, [52, 1, 2, 3, 4, 5, 6], window=4, windows=2, skip_fraction=0.0)
    assert torch.cat(decoder.seen).tolist() == [[52, 1, 2, 3], [52, 4, 5, 6]]


def test_bos_without_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="bos=True, but the model's tokenizer names no BOS"):
        perplexity(Bigram(), [1] * 100, window=8, bos=True)


def test_ids_need_no_tokenizer() -> None:
    table = Bigram().table
    plain = perplexity(lambda ids: SimpleNamespace(logits=table[ids]), [1] * 100, window=8)
    assert plain.value == perplexity(Bigram(), [1] * 100, window=8).value


def test_progress() -> None:
    calls: list[tuple[int, int]] = []
    perplexity(
        Bigram(),
        [1, 2, 3] * 8,
        window=4,
        windows=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 1}, "at least 2 tokens, got 1"),
        ({"windows": 0}, "at least 1, got 0"),
        ({"skip_fraction": 1.0}, r"\[0, 1\), got 1.0"),
        ({"skip_fraction": float("nan")}, r"\[0, 1\), got nan"),
        ({"window": 65}, "65 tokens exceeds the decoder's context of 64"),
        ({"window": 50, "windows": 3}, "need 150 tokens, but .* there are 90"),
    ],
)
def test_bad_arguments(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(), [1] * 100, **kwargs)


def test_bad_ids() -> None:
    with pytest.raises(TypeError, match=r"int64 or int32, got torch\.float32"):
        perplexity(Bigram(), torch.zeros(100), window=8)
    with pytest.raises(ValueError, match=r"shape \[T\], got \[2, 50\]"):
        perplexity(Bigram(), torch.zeros(2, 50, dtype=torch.int64), window=8)


def test_non_finite_logits_are_an_error() -> None:
    decoder = Bigram()
    decoder.table[5] = float("nan")
    ids = [1] * 8 + [5] * 8
    with pytest.raises(RuntimeError, match="window 1 give nan"):
        perplexity(decoder, ids, window=8, windows=2, skip_fraction=0.0)


def test_result_is_a_number() -> None:
    assert float(Perplexity(2.0, math.log(2), (math.log(2),), 2, 1)) == 2.0


# KL divergence and agreement


def logits_of(*distributions: list[float]) -> torch.Tensor:
    return torch.tensor(distributions).log()


def test_kl_of_known_distributions() -> None:
    p = logits_of([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0])
    q = logits_of([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0])
    # 0.5 log 2 + 0 + 0.25 log(1/2); log 2; 0; and infinite, as q rules out what p has.
    want = torch.tensor([0.25 * math.log(2), math.log(2), 0.0, math.inf], dtype=torch.float64)
    torch.testing.assert_close(kl_divergence(p, q + 3.0), want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 53), (3, 1 << 19), (5, (1 << 21) + 3)])
def test_kl_does_not_depend_on_the_blocks(
    rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    p, q = (torch.randn(rows, vocab, generator=generator) for _ in range(2))
    blocks = kl_divergence(p, q)
    monkeypatch.setattr(evaluate, "_ENTRIES", 1 << 30)
    # Within rounding only: torch splits a sum over the vocabulary by the number of rows.
    torch.testing.assert_close(blocks, kl_divergence(p, q), atol=1e-12, rtol=0.0)
    direct = torch.nn.functional.kl_div(
        q.double().log_softmax(1), p.double().log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    # Differences of logits (below 16) and exponentials, each within half an ulp of float32.
    torch.testing.assert_close(blocks, direct, atol=16 * 2.0**-23, rtol=0.0)


def test_kl_of_the_same_is_zero_and_never_negative() -> None:
    p = torch.randn(50, 5000, generator=torch.Generator().manual_seed(5)) * 4
    assert torch.equal(kl_divergence(p, p), torch.zeros(50, dtype=torch.float64))
    assert (kl_divergence(p, p * (1 + 1e-7)) >= 0).all()


def test_kl_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"the same shape .*\[3, 4\] and \[3, 5\]"):
        kl_divergence(torch.zeros(3, 4), torch.zeros(3, 5))


def shifted(decoder: Bigram, noise: float, seed: int = 9) -> Bigram:
    other = Bigram()
    other.table = decoder.table + noise * torch.randn(
        decoder.table.shape, generator=torch.Generator().manual_seed(seed)
    )
    return other


def test_compare_is_what_a_direct_computation_gives() -> None:
    reference = Bigram()
    model = shifted(reference, 0.7)
    ids = torch.randint(0, 53, (40,), generator=torch.Generator().manual_seed(6))
    report = compare(reference, {"noisy": model}, ids, window=8, windows=4, skip_fraction=0.0)
    at, targets = ids[:32].view(4, 8)[:, :-1].flatten(), ids[:32].view(4, 8)[:, 1:].flatten()
    logp, logq = (d.table.double()[at].log_softmax(1) for d in (reference, model))
    kl = (logp.exp() * (logp - logq)).sum(1)
    nats = [-x.gather(1, targets[:, None])[:, 0] for x in (logp, logq)]
    change, same = nats[1] - nats[0], (logp.argmax(1) == logq.argmax(1)).double()
    row, d = report["noisy"], report["noisy"].divergence
    assert d is not None and report["float"].divergence is None
    assert 0.0 < d.top1 < 1.0  # or the check of agreement is none
    close = {"rel": 5e-6, "abs": 1e-6}
    assert row.perplexity == pytest.approx(math.exp(nats[1].mean()), **close)
    assert d.kl_mean == pytest.approx(kl.mean().item(), **close)
    assert d.kl_error == pytest.approx(kl.std().item() / math.sqrt(28), **close)
    assert d.kl_p99 == pytest.approx(kl.quantile(0.99).item(), **close)
    assert d.kl_max == pytest.approx(kl.max().item(), **close)
    assert d.top1 == same.mean().item()
    assert d.ratio == pytest.approx(math.exp(change.mean()), **close)
    assert d.ratio_error == pytest.approx(d.ratio * change.std().item() / math.sqrt(28), **close)
    assert report.predictions == 28


def test_compare_with_itself() -> None:
    decoder = Bigram()
    report = compare(decoder, {"same": decoder}, [1, 2, 3] * 20, window=8, windows=2)
    d = report["same"].divergence
    assert d is not None
    assert (d.kl_mean, d.kl_max, d.top1, d.ratio, d.ratio_error) == (0.0, 0.0, 1.0, 1.0, 0.0)


def test_the_last_position_counts_nowhere() -> None:
    reference, model = Bigram(), Bigram()
    model.table[7] = model.table[7].flip(0)  # 7 stands only at the end
    report = compare(
        reference, {"m": model}, [1, 2, 3, 7] * 9, window=4, windows=2, skip_fraction=0.0
    )
    d = report["m"].divergence
    assert d is not None and d.kl_max == 0.0 and d.top1 == 1.0


def test_without_a_reference_there_are_perplexities() -> None:
    decoder = Bigram()
    report = compare(None, {"a": decoder, "b": shifted(decoder, 1.0)}, [1, 2] * 40, window=8)
    alone = perplexity(decoder, [1, 2] * 40, window=8)
    assert report["a"].perplexity == alone.value and report["a"].divergence is None
    assert "kl_mean" not in str(report)


def test_windows_go_through_the_models_in_turn() -> None:
    calls: list[tuple[int, int]] = []
    models = {name: Bigram() for name in "abc"}
    order: list[str] = []

    def named(name: str) -> Any:
        def call(input_ids: torch.Tensor) -> SimpleNamespace:
            order.append(name)
            return models[name](input_ids)

        return call

    compare(
        named("a"),
        {n: named(n) for n in "bc"},
        [1, 2, 3, 4] * 10,
        window=4,
        windows=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert order == list("abcabc")
    assert calls == [(i, 6) for i in range(1, 7)]


def test_compare_refuses() -> None:
    class Small(Bigram):
        def __init__(self) -> None:
            super().__init__(vocab=40)

    ids, shape = [1, 2] * 40, {"window": 8, "windows": 2}
    with pytest.raises(ValueError, match="small has a vocabulary of 40, the reference one of 53"):
        compare(Bigram(), {"small": Small()}, ids, **shape)
    with pytest.raises(ValueError, match="are both called 'x'"):
        compare(Bigram(), {"x": Bigram()}, ids, name="x", **shape)
    with pytest.raises(ValueError, match="got neither"):
        compare(None, {}, ids, **shape)
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        compare(lambda x: None, {}, "a text", **shape)
    with pytest.raises(ValueError, match="exceeds tight's context of 4"):
        tight = Bigram()
        tight.max_seq_len = 4
        compare(Bigram(), {"tight": tight}, ids, **shape)
    bad = Bigram()
    bad.table[1] = float("inf")
    with pytest.raises(RuntimeError, match="those of bad are not finite"):
        compare(Bigram(), {"bad": bad}, ids, **shape)
    wide = SimpleNamespace(logits=torch.zeros(1, 3, 53))
    with pytest.raises(ValueError, match=r"wide must give logits of shape \[1, 8, vocab\]"):
        compare(Bigram(), {"wide": lambda x: wide}, ids, **shape)


def test_a_model_in_training_mode_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"in training mode.*call \.eval\(\) first"):
        perplexity(model, [1] * 100, window=8)


def test_a_transformers_model_and_its_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(60)]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    text = " ".join(words[(7 * i) % 60] for i in range(90))
    report = compare(model, {"same": model}, text, tokenizer=tokenizer, window=16, windows=4)
    size = report["float"].size
    assert size is not None and size.bits == 32.0
    d = report["same"].divergence
    assert d is not None and (d.kl_max, d.top1) == (0.0, 1.0)
    with pytest.raises(ValueError, match="exceeds float's context of 16 tokens"):
        compare(model, {}, text, tokenizer=tokenizer, window=17, windows=1)


def test_the_table_can_be_cut_by_columns() -> None:
    decoder = Bigram()
    report = compare(decoder, {"W4 g32": shifted(decoder, 0.2)}, [1, 2] * 40, window=8, windows=2)
    lines = [line.split() for line in str(report).splitlines()]
    assert {len(line) for line in lines} == {8} and lines[2][0] == "W4_g32"
    rows = report.to_dict()["rows"]
    assert rows[1]["kl_mean"] > 0 and "kl_mean" not in rows[0]
    with pytest.raises(KeyError, match="no row 'W9'; there are float, W4 g32"):
        report["W9"]


# Sizes


def test_size_counts_a_shared_matrix_once() -> None:
    table, head, linear = (
        torch.nn.Embedding(100, 16),
        torch.nn.Linear(16, 100),
        torch.nn.Linear(16, 8),
    )
    head.weight = table.weight
    size = model_size(torch.nn.ModuleList([table, head, linear]))
    assert size == ModelSize(1600 + 100 + 128 + 8, 4 * (1600 + 100 + 128 + 8), 128, 4 * 128)
    assert (size.bits, size.linear_bits) == (32.0, 32.0)


def test_size_of_packed_layers() -> None:
    spec = QuantSpec(4, 32)
    packed: PackedWeight = quantize_packed(torch.randn(64, 64), spec)
    size = model_size(torch.nn.Sequential(QuantLinear(packed), torch.nn.LayerNorm(64)))
    assert (size.parameters, size.linear_parameters) == (64 * 64 + 128, 64 * 64)
    assert size.linear_bits == spec.bits_per_weight == 4.5
    assert size.nbytes == packed.nbytes + 4 * 128


def test_size_without_linear_layers() -> None:
    assert model_size(torch.nn.LayerNorm(8)).linear_bits is None
    assert model_size(torch.nn.ReLU()).bits is None
