"""LoRA on SmolLM2-135M with 4-bit weights: what training gains, and what merging costs.

    python bench/lora_smollm2.py [--steps 24] [--text NOVEL] [--threads 2] [--no-write]

Writes bench/results/lora-smollm2.json. The weights are those of the GGUF file (4 bits, groups of
32 with minima), activations are int8. Adapters of all linear layers (r = 8) are trained on windows
of a novel; the loss is then measured on windows that come after those. The same adapters are
merged into the format the weights have, into 8 bits, and kept apart.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import real_models
import record
import torch

WINDOW, HELD_OUT = 128, 8


def loss_of(model: Any, windows: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(model(w[None], labels=w[None]).loss.item() for w in windows) / len(windows)


def train(model: Any, windows: torch.Tensor, rate: float) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    losses = []
    for window in windows:
        loss = model(window[None], labels=window[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)
    model.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--text", type=Path, help="default: ../shared/data/persuasion.txt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    import peft

    import qkernels.peft as qpeft

    base, tokenizer = real_models.smollm2_packed()
    count = WINDOW * (options.steps + HELD_OUT)
    # About four characters make a token; five are more than enough.
    text = real_models.novel(options.text)[20000 : 20000 + 5 * count]
    ids = torch.tensor(tokenizer(text)["input_ids"])[:count].view(-1, WINDOW)
    windows, held_out = ids[: options.steps], ids[options.steps :]
    before = loss_of(base, held_out)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    start = time.perf_counter()
    losses = train(model, windows, options.rate)
    seconds = time.perf_counter() - start
    after = loss_of(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = real_models.smollm2_packed()[0]
        again = peft.PeftModel.from_pretrained(fresh, folder).eval()
        with torch.no_grad():
            same = torch.equal(again(held_out[:1]).logits, model(held_out[:1]).logits)
    rows = [{"what": "without adapters", "loss": before}, {"what": "adapters apart", "loss": after}]
    for spec in (None, "W8A16"):
        merged, report = qpeft.merge_and_unload(copy.deepcopy(model), spec)
        what = f"merged into {spec or 'the format of the weights'}"
        cost = {"error": report.error, "change": report.change, "kept": report.kept}
        rows.append({"what": what, "loss": loss_of(merged, held_out), **cost})
        print(report.summary(), flush=True)
    for row in rows:
        print(f"{row['what']}: held-out loss {row['loss']:.4f}")
    print(f"reloads equal: {same}; {seconds / len(losses):.2f} s per step")
    body = {
        "model": real_models.SMOLLM2,
        "window": WINDOW,
        "held_out_windows": HELD_OUT,
        "learning_rate": options.rate,
        "losses": losses,
        "reloads_equal": same,
        "rows": rows,
    }
    if not options.no_write:
        print(record.write("lora-smollm2", "lora", options.threads, body))


if __name__ == "__main__":
    main()
