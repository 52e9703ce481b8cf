"""Speed of transformers models after `qk.quantize_`, beside the same model as it was.

    python bench/bench_transformers.py [--threads 2] [--rounds 5]

SmolLM2-135M in bfloat16: greedy generation of 64 tokens after a prompt of 32, and a forward pass
over 512 tokens; all-MiniLM-L6-v2 in float32: a batch of 32 sentences of 64 tokens. All variants
live in one process and take turns, the order reversed every round; medians. Before that, each
quantized model has to agree with its own dequantized self. Writes
bench/results/transformers-<model>.json.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import real_models
import record
import torch

import qkernels as qk
from qkernels.convert import QuantWarning
from qkernels.evaluate import kl_divergence
from qkernels.model_size import model_size

PROMPT, NEW, PREFILL = 32, 64, 512
BATCH, LENGTH = 32, 64
# Arguments of `qk.quantize_`; the first is the three lines of README.md.
VARIANTS: dict[str, dict[str, Any]] = {
    "W4A16": {},
    "W4A8": {"spec": "W4A8"},
    "W4A8, embeddings W8": {"spec": "W4A8", "embeddings": "W8A8"},
    "W8A8": {"spec": "W8A8"},
}


def quantized(model: Any, arguments: dict[str, Any]) -> Any:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)  # the table has the sizes
        qk.quantize_(model, **arguments, progress=False)
    return model


def ids(vocab: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def generate(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape[1] == prompt.shape[1] + count
    return out


def native_speeds(decoder: Any, turn: int) -> dict[str, float]:
    """The same of a QuantDecoder."""
    vocab = decoder.config.vocab
    prompt = ids(vocab, 1, PROMPT, seed=turn)[0].tolist()

    def run(count: int) -> None:
        out = decoder.generate([prompt], max_new_tokens=count, temperature=0, stop_at_eos=False)
        assert len(out.tokens[0]) == count

    one, many = seconds(lambda: run(1)), seconds(lambda: run(NEW + 1))
    long = ids(vocab, 1, PREFILL, seed=turn)
    prefill = seconds(lambda: decoder(long, logits_to_keep=1))
    return {"decode": NEW / (many - one), "prefill": PREFILL / prefill}


def decoder_speeds(model: Any, turn: int) -> dict[str, float]:
    if isinstance(model, qk.QuantDecoder):
        return native_speeds(model, turn)
    vocab = model.config.vocab_size
    prompt, long = ids(vocab, 1, PROMPT, seed=turn), ids(vocab, 1, PREFILL, seed=turn)
    one = seconds(lambda: generate(model, prompt, 1))
    many = seconds(lambda: generate(model, prompt, NEW + 1))
    prefill = seconds(lambda: model(long, logits_to_keep=1))
    return {"decode": NEW / (many - one), "prefill": PREFILL / prefill}


def encoder_speeds(model: Any, turn: int) -> dict[str, float]:
    batch = ids(model.config.vocab_size, BATCH, LENGTH, seed=turn)
    return {"encode": BATCH / seconds(lambda: model(batch))}


def interleaved(
    models: dict[str, Any], speeds: Callable[[Any, int], dict[str, float]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):  # the first warms up
            order = list(models) if turn % 2 else list(models)[::-1]
            for name in order:
                for what, value in speeds(models[name], turn).items():
                    if turn:
                        samples[name].setdefault(what, []).append(value)
    return samples


def check(name: str, model: Any) -> None:
    """Raises RuntimeError unless the model says what its dequantized self says."""
    dense = copy.deepcopy(model)
    qk.dequantize_(dense)
    given = ids(model.config.vocab_size, 1, 64, seed=1)

    def said(of: Any) -> torch.Tensor:
        with torch.no_grad():
            out = of(given)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0]

    kl = kl_divergence(said(dense), said(model)).mean().item()
    # int8 activations and bfloat16 sums stay far below 4-bit weights, which cost 0.1 and more.
    if not kl < 0.05:
        raise RuntimeError(f"{name}: KL {kl:.3g} against its own dequantized weights")


def measure(
    model: Any, label: str, baseline: str, speeds: Callable[[Any, int], Any], rounds: int
) -> dict[str, Any]:
    models = {baseline: model}
    for name, arguments in VARIANTS.items():
        models[name] = quantized(model, arguments)
        check(name, models[name])
    if speeds is decoder_speeds:  # the same model and scheme, outside transformers
        models["QuantDecoder, W4A8, embeddings W8"] = qk.QuantDecoder.from_pretrained(
            model, "W4A8", embeddings="W8A16"
        )
    samples = interleaved(models, speeds, rounds)
    rows = []
    for name, taken in samples.items():
        size = model_size(models[name])
        row: dict[str, Any] = {"name": name, "mb": round(size.nbytes / 1e6, 1)}
        row |= {"linear_mb": round(size.linear_nbytes / 1e6, 1)}
        row |= {what: record.summary(values) for what, values in taken.items()}
        for what in taken:
            row[f"{what}_ratio"] = round(
                row[what]["median"] / record.summary(samples[baseline][what])["median"], 3
            )
        rows.append(row)
        said = "  ".join(
            f"{what} {row[what]['median']:8.1f}/s ({row[f'{what}_ratio']:.2f}x)" for what in taken
        )
        print(f"{label}  {name:20} {row['mb']:7.1f} MB  {said}", flush=True)
    return {"model": label, "baseline": baseline, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    both = ["smollm2", "minilm"]
    parser.add_argument("--models", nargs="+", choices=both, default=both)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        if name == "smollm2":
            model, _ = real_models.causal_from_gguf(real_models.smollm2_file(), torch.bfloat16)
            body = measure(
                model, "SmolLM2-135M-Instruct", "bfloat16", decoder_speeds, options.rounds
            )
            body |= {"prompt": PROMPT, "decode": NEW, "prefill": PREFILL}
        else:
            model, _ = real_models.minilm()
            body = measure(model, "all-MiniLM-L6-v2", "float32", encoder_speeds, options.rounds)
            body |= {"batch": BATCH, "length": LENGTH}
        if not options.no_write:
            print(record.write(f"transformers-{name}", "transformers", options.threads, body))


if __name__ == "__main__":
    main()
