"""evaluate.perplexity against a direct float64 computation; its text handling and its errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qkernels.evaluate import Perplexity, join_lines, perplexity, window_nats


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
