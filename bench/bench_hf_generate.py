"""Speed of transformers' `generate` with our linears, attention and cache, beside QuantDecoder.

    python bench/bench_hf_generate.py [--threads 2] [--rounds 5] [--quick] [--variants NAME ...]

SmolLM2-135M: greedy decoding after a prompt of 32 tokens, and the time of a prompt of 512. All
variants hold the same weights (W4A8, the table of embeddings and output at 8 bits), live in one
process and take turns, the order reversed every round; medians, and medians of the ratios of each
round: decoding, compiled, has to reach 0.4 of QuantDecoder. Before that, every variant has to agree
with the first of ours. Writes bench/results/hf-generate.json.

--quick: 3 rounds of 16 tokens and prompts of 128, without the variants that wait for a C++
compiler; writes nothing.
A new variant is a function below with @variant; it is made of the float model.
"""

from __future__ import annotations

import copy
import time
import warnings
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import real_models
import record
import torch

import qkernels as qk
import qkernels.hf as hf
from qkernels.convert import QuantWarning

PROMPT, NEW, PREFILL, ROOM = 32, 64, 512, 640
BASELINE, NATIVE = "bfloat16", "QuantDecoder"
GATED, LEAST = "the same, compiled", 0.4


@dataclass
class Variant:
    """A model, and the cache that it generates into, or None for transformers' own."""

    model: Any
    cache: Any = None
    compile_seconds: float = field(default=0.0)


VARIANTS: dict[str, Callable[[Any], Variant]] = {}
COMPILED: set[str] = set()  # those that need a C++ compiler, for a minute or more


def variant(name: str, compiled: bool = False) -> Callable[..., Any]:
    def add(make: Callable[[Any], Variant]) -> Callable[[Any], Variant]:
        VARIANTS[name] = make
        if compiled:
            COMPILED.add(name)
        return make

    return add


@variant(BASELINE)
def stock(model: Any) -> Variant:
    return Variant(model)


@variant("linears")
def linears(model: Any) -> Variant:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        qk.quantize_(model, "W4A8", embeddings="W8A8", progress=False)
    return Variant(model)


@variant("linears, attention, int8 cache")
def attention_and_cache(model: Any) -> Variant:
    model = linears(model).model
    model.set_attn_implementation(hf.ATTENTION)
    return Variant(model, hf.QuantizedStaticCache(model.config, ROOM, "int8"))


@variant("the same, replayed")
def replayed(model: Any) -> Variant:
    made = attention_and_cache(model)
    hf.compile_decode(made.model, "eager")
    return made


@variant("the same, compiled", compiled=True)
def compiled(model: Any) -> Variant:
    made = attention_and_cache(model)
    hf.compile_decode(made.model)
    return made


# Variants with whole layers replaced go here.


@variant(NATIVE)
def native(model: Any) -> Variant:
    return Variant(qk.QuantDecoder.from_pretrained(model, "W4A8", embeddings="W8A16"))


def ids(vocab: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


def answer(made: Variant, prompt: torch.Tensor, count: int) -> list[int]:
    """`count` greedy tokens."""
    if isinstance(made.model, qk.QuantDecoder):
        out = made.model.generate(
            [prompt[0].tolist()], max_new_tokens=count, temperature=0, stop_at_eos=False
        )
        return list(out.tokens[0])
    if made.cache is not None:
        made.cache.reset()
    out = made.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        past_key_values=made.cache,
    )
    assert out.shape[1] == prompt.shape[1] + count
    return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speeds(made: Variant, turn: int, new: int, prefill: int) -> dict[str, float]:
    vocab = (
        made.model.config.vocab
        if isinstance(made.model, qk.QuantDecoder)
        else made.model.config.vocab_size
    )
    prompt, long = ids(vocab, PROMPT, turn), ids(vocab, prefill, turn)
    one = seconds(lambda: answer(made, prompt, 1))
    many = seconds(lambda: answer(made, prompt, new + 1))
    whole = seconds(lambda: answer(made, long, 1))
    return {"decode": new / (many - one), "prefill": prefill / whole}


def check(models: dict[str, Variant]) -> None:
    """Raises RuntimeError unless ours give mostly the tokens of the first of them: int8 keys, and
    bfloat16 sums in another order, change those that are nearly as likely as others."""
    ours = [name for name in models if name not in (BASELINE, NATIVE)]
    truth: list[int] = []
    for name in ours:
        made = models[name]
        start = time.perf_counter()
        said = answer(made, ids(1000, PROMPT, 1), 8)
        made.compile_seconds = time.perf_counter() - start
        truth = truth or said
        if said[0] != truth[0]:
            raise RuntimeError(f"{name}: its tokens are {said}, those of {ours[0]} are {truth}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    quick: tuple[int, int, int] = (3, 16, 128)
    rounds, new, prefill = quick if options.quick else (options.rounds, NEW, PREFILL)
    names = options.variants or [
        name for name in VARIANTS if not (options.quick and name in COMPILED)
    ]
    torch.set_num_threads(options.threads)
    model, _ = real_models.causal_from_gguf(real_models.smollm2_file(), torch.bfloat16)
    model.generation_config.eos_token_id = None  # answers of the length asked for
    models = {name: VARIANTS[name](model) for name in names}
    check(models)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):  # the first warms up
            for name in list(models) if turn % 2 else list(models)[::-1]:
                for what, value in speeds(models[name], turn, new, prefill).items():
                    if turn:
                        samples[name].setdefault(what, []).append(value)
    rows = []
    for name, taken in samples.items():
        row: dict[str, Any] = {"name": name, "compile_seconds": models[name].compile_seconds}
        said = ""
        for what, values in taken.items():
            row[what] = record.summary(values)
            said += f"  {what} {row[what]['median']:7.1f}/s"
            for other in (BASELINE, NATIVE):
                if other in samples:
                    ratio = record.ratio(values, samples[other][what])
                    row[f"{what}_of_{other}"] = ratio
                    said += f" ({ratio:.2f} of {other})"
        rows.append(row)
        print(f"{name:32}{said}", flush=True)
    reached = {row["name"]: row.get(f"decode_of_{NATIVE}") for row in rows}.get(GATED)
    if reached is not None:
        ok = "ok" if reached >= LEAST else "MISSED"
        print(f"{GATED}: {reached:.2f} of {NATIVE}, at least {LEAST} {ok}")
    if not (options.no_write or options.quick or options.variants):
        body = {"model": "SmolLM2-135M-Instruct", "rows": rows, "prompt": PROMPT, "decode": new}
        body |= {"prefill": PREFILL, "rounds": rounds}
        gate = {"row": GATED, "what": "decode", "of": NATIVE, "at_least": LEAST, "is": reached}
        body["gates"] = [gate]
        print(record.write("hf-generate", "hf-generate", options.threads, body))


if __name__ == "__main__":
    main()
