"""MiniLM, T5 and Whisper in transformers, with packed layers and our attention: do they say what
their float models say?

    python bench/encoders.py [--models minilm t5 whisper] [--text NOVEL] [--threads 2] [--no-write]

Writes bench/results/encoders.json. Each model is quantized by `qk.quantize_` and run with
attn_implementation="qkernels", beside the float32 model with transformers' own attention. MiniLM:
the worst and the mean cosine over 16 everyday sentences (those of tests/test_encoders.py) and over
those of a novel. Whisper hears eSpeak NG (the package espeakng-loader).
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import real_models
import record
import torch

import qkernels as qk
import qkernels.hf
from qkernels.convert import QuantWarning

SPECS: dict[str, tuple[Any, str]] = {
    "W8A16": ("W8A16", "auto"),
    "W8A8": ("W8A8", "auto"),
    "W4 g32 min A16": (qk.QuantSpec(4, 32, zero="minimum"), "float"),
    "W4 g32 zero A16": (qk.QuantSpec(4, 32, zero="integer"), "float"),
    "W4A16": ("W4A16", "auto"),
}
T5_PROMPTS = [
    "translate English to German: The house is wonderful.",
    "Summarize: Fixed the failing test in the parser by handling empty input.",
]
SPOKEN = [
    "The quick brown fox jumps over the lazy dog.",
    "The house on the hill is wonderful in the morning.",
    "Please send the letter to the office before noon.",
    "How many people live in the city today?",
]


def quantized(model: Any, name: str) -> Any:
    spec, act = SPECS[name]
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantWarning)
        qk.quantize_(model, spec, act=act, progress=False)
    model.set_attn_implementation(qkernels.hf.ATTENTION)
    return model


def minilm(options: argparse.Namespace) -> list[dict[str, Any]]:
    sys.path.insert(0, str(record.ROOT / "tests"))
    from test_encoders import SENTENCES

    model, tokenizer = real_models.minilm()
    text = real_models.novel(options.text)[30000:110000]
    split = (s.strip().replace("\n", " ") for s in re.split(r"(?<=[.!?])\s", text))
    sets = {"everyday": SENTENCES, "novel": [s for s in split if 20 < len(s) < 300][:300]}
    exact = {name: real_models.embed(model, tokenizer, s) for name, s in sets.items()}
    rows = []
    for spec in SPECS:
        ours = quantized(model, spec)
        for name, sentences in sets.items():
            cosines = (real_models.embed(ours, tokenizer, sentences) * exact[name]).sum(1)
            rows.append(
                {
                    "spec": spec,
                    "sentences": f"{len(sentences)} {name}",
                    "worst": cosines.min().item(),
                    "mean": cosines.mean().item(),
                }
            )
    return rows


def t5(options: argparse.Namespace) -> list[dict[str, Any]]:
    from real_t5 import t5 as load

    model, tokenizer = load()

    def say(model: Any) -> list[str]:
        given = tokenizer(T5_PROMPTS, padding=True, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=24, do_sample=False)
        return tokenizer.batch_decode(out, skip_special_tokens=True)

    exact = say(model)
    rows: list[dict[str, Any]] = [{"spec": "float32", "says": exact}]
    for spec in SPECS:
        says = say(quantized(model, spec))
        rows.append({"spec": spec, "says": says, "equal": says == exact})
    return rows


def whisper(options: argparse.Namespace) -> list[dict[str, Any]]:
    from real_speech import features, speak

    model, tokenizer = real_models.whisper(), real_models.whisper_tokenizer()
    heard = [features(speak(text)) for text in SPOKEN]

    def say(model: Any) -> list[str]:
        prompt = torch.tensor(real_models.WHISPER_PROMPT)
        found = []
        for sound in heard:
            out = model.generate(
                sound, decoder_input_ids=prompt, max_new_tokens=40, do_sample=False
            )
            found.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
        return found

    exact = say(model)
    rows: list[dict[str, Any]] = [{"spec": "float32", "says": exact, "spoken": SPOKEN}]
    for spec in SPECS:
        says = say(quantized(model, spec))
        rows.append({"spec": spec, "says": says, "equal": says == exact})
    return rows


RUNS = {"minilm": minilm, "t5": t5, "whisper": whisper}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--text", type=Path, help="default: ../shared/data/persuasion.txt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    body = {}
    for name in options.models:
        body[name] = RUNS[name](options)
        for row in body[name]:
            print(name, row, flush=True)
    if not options.no_write and set(body) == set(RUNS):
        print(record.write("encoders", "encoders", options.threads, body))


if __name__ == "__main__":
    main()
