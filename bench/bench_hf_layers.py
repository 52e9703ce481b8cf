"""Speed of stock `generate` with decoder layers of ours, beside the same model without and beside
QuantDecoder.

    python bench/bench_hf_layers.py [--threads 2] [--rounds 7]

SmolLM2-135M: greedy generation of 64 tokens after a prompt of 32, and a forward pass over 512
tokens. Rows: the model in bfloat16; its linear layers quantized (W4A8, embeddings and head W8A8);
its decoder layers replaced too; QuantDecoder with the same weights; and the replaced model with
layers that do nothing, which is what `generate`, embedding and head cost by themselves. All live in
one process and take turns, the order reversed every round; medians, and the medians of the ratios
of each round. Before that, the replaced model has to agree with itself before. Writes
bench/results/hf-layers-smollm2.json. Takes about two minutes on two free cores.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import real_models
import record
import torch

import qkernels as qk
from qkernels.evaluate import kl_divergence

PROMPT, NEW, PREFILL = 32, 64, 512
SPEC, EMBEDDINGS = "W4A8", "W8A8"
BASELINE, LINEARS, REPLACED = "bfloat16", "linear layers", "decoder layers"
DECODER, NOTHING = "QuantDecoder", "layers that do nothing"
# (row, what, of which row, at least): what the package promises.
GATES = (
    (REPLACED, "decode", DECODER, 0.7),
    (REPLACED, "decode", BASELINE, 3.0),
    (REPLACED, "prefill", BASELINE, 2.0),
)


def ids(vocab: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def generate(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    """`count` greedy tokens, whatever they are."""
    if isinstance(model, qk.QuantDecoder):
        out = model.generate(
            [prompt[0].tolist()], max_new_tokens=count, temperature=0, stop_at_eos=False
        )
        return out.tokens[0]
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0, prompt.shape[1] :].tolist()


def speeds(model: Any, vocab: int, turn: int) -> dict[str, float]:
    prompt, long = ids(vocab, PROMPT, turn), ids(vocab, PREFILL, turn)
    counts: list[int] = []
    one = seconds(lambda: counts.append(len(generate(model, prompt, 1))))
    many = seconds(lambda: counts.append(len(generate(model, prompt, NEW + 1))))
    if counts != [1, NEW + 1]:
        raise RuntimeError(f"expected 1 and {NEW + 1} tokens, got {counts}")
    prefill = seconds(lambda: model(long, logits_to_keep=1))
    return {"decode": NEW / (many - one), "prefill": PREFILL / prefill}


def interleaved(
    models: dict[str, Any], vocab: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):  # the first warms up
            order = list(models) if turn % 2 else list(models)[::-1]
            for name in order:
                for what, value in speeds(models[name], vocab, turn).items():
                    if turn:
                        samples[name].setdefault(what, []).append(value)
    return samples


def variants(model: Any) -> dict[str, Any]:
    # Without an end of sequence `generate` always makes as many tokens as asked for, and needs no
    # processor that goes over the vocabulary to keep it from ending.
    model.generation_config.eos_token_id = None
    linears = copy.deepcopy(model)
    qk.quantize_(linears, SPEC, embeddings=EMBEDDINGS, progress=False)
    replaced = qk.replace_decoder_layers_(copy.deepcopy(linears))
    given = ids(model.config.vocab_size, 64, 1)
    with torch.no_grad():
        kl = kl_divergence(linears(given).logits[0], replaced(given).logits[0]).mean().item()
    # The same weights and scheme. What differs is that the host rounds to bfloat16 between modules,
    # and its frequencies too, when a model is cast; 4-bit weights cost 0.1 and more.
    if not kl < 0.05:
        raise RuntimeError(f"{REPLACED}: KL {kl:.3g} against the same model with its own layers")
    nothing = copy.deepcopy(replaced)
    nothing.get_decoder().layers.run = lambda hidden, layer, **named: hidden
    decoder = qk.QuantDecoder.from_pretrained(model, SPEC, embeddings="W8A16")
    return {
        BASELINE: model,
        LINEARS: linears,
        REPLACED: replaced,
        DECODER: decoder,
        NOTHING: nothing,
    }


def ratio(samples: dict[str, dict[str, list[float]]], row: str, what: str, of: str) -> float:
    return record.ratio(samples[row][what], samples[of][what])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = real_models.causal_from_gguf(real_models.smollm2_file(), torch.bfloat16)
    samples = interleaved(variants(model), model.config.vocab_size, options.rounds)
    rows = []
    for name, taken in samples.items():
        row: dict[str, Any] = {"name": name}
        for what, values in taken.items():
            row[what] = record.summary(values)
            row[f"{what}_ratio"] = ratio(samples, name, what, BASELINE)
            row[f"{what}_of_decoder"] = ratio(samples, name, what, DECODER)
        rows.append(row)
        print(
            f"{name:24} decode {row['decode']['median']:7.1f}/s  prefill "
            f"{row['prefill']['median']:8.1f}/s   of bfloat16 {row['decode_ratio']:.2f}, "
            f"{row['prefill_ratio']:.2f}   of QuantDecoder {row['decode_of_decoder']:.2f}",
            flush=True,
        )
    gates = []
    for name, what, of, least in GATES:
        found = ratio(samples, name, what, of)
        gates.append({"row": name, "what": what, "of": of, "at_least": least, "is": found})
        print(
            f"{what} of {of}: {found:.2f}, at least {least} {'ok' if found >= least else 'NOT MET'}"
        )
    body = {"model": "SmolLM2-135M-Instruct", "baseline": BASELINE, "rows": rows, "gates": gates}
    body |= {"scheme": SPEC, "embeddings": EMBEDDINGS}
    body |= {"prompt": PROMPT, "decode": NEW, "prefill": PREFILL}
    if not options.no_write:
        print(record.write("hf-layers-smollm2", "hf-layers", options.threads, body))


if __name__ == "__main__":
    main()
