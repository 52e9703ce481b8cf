"""Decode and prefill side by side with llama.cpp (llama-cpp-python) on the same GGUF file.

    python bench/peer_llama_cpp.py MODEL [--peer-python PYTHON] [--threads 2] [--rounds 7]

Each engine runs in a process of its own, with the model loaded once; the rounds alternate between
them, and so does who goes first, so that both meet the same machine. PYTHON is the interpreter of
an environment with llama-cpp-python (default: this one). Before anything is timed, the greedy
tokens of both are compared.

What is timed. Prefill: a prompt of random ids, new in every round, until the logits of its last
token are there. Decode: after a prompt of 32 tokens, from the first new token to the last, greedy,
argmax included. llama.cpp is driven through its C functions, without the sampling chain and the
copies of the Python class `Llama`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

Ids = list[int]


class Engine(Protocol):
    vocab: int
    about: dict[str, Any]

    def prefill(self, ids: Ids) -> float:
        """Seconds until the logits of the last token."""
        ...

    def decode(self, ids: Ids, count: int) -> tuple[float, Ids]:
        """Seconds from the first new token to the last of `count`, and the greedy tokens."""
        ...


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python binds."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp
        import numpy

        self._c, self._np = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_load_model_from_file(path.encode(), model)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context  # n_ubatch stays at its default, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_new_context_with_model(self._model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        info = llama_cpp.llama_print_system_info().decode()
        self.about = {
            "name": "llama.cpp",
            "llama-cpp-python": llama_cpp.__version__,
            "system": info,
        }

    def _eval(self, ids: Ids) -> int:
        tokens = (self._c.llama_token * len(ids))(*ids)
        code = self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(self._np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def prefill(self, ids: Ids) -> float:
        self._clear()
        start = time.perf_counter()
        self._eval(ids)
        return time.perf_counter() - start

    def decode(self, ids: Ids, count: int) -> tuple[float, Ids]:
        self._clear()
        tokens = [self._eval(ids)]
        start = time.perf_counter()
        while len(tokens) < count:
            tokens.append(self._eval(tokens[-1:]))
        return time.perf_counter() - start, tokens


class Qkernels:
    """QuantDecoder as its users call it."""

    def __init__(self, path: str, threads: int, context: int, act: str, kv_dtype: str) -> None:
        import torch

        import qkernels

        torch.set_num_threads(threads)
        self._decoder = qkernels.QuantDecoder.from_pretrained(
            path, act=act, kv_dtype=kv_dtype, max_seq_len=context
        )
        self.vocab = self._decoder.config.vocab
        isa = torch.ops.qkernels.cpu_isa()
        self.about = {"name": "qkernels", "act": act, "kv_dtype": kv_dtype, "isa": isa}

    def _generate(self, ids: Ids, count: int) -> Any:
        return self._decoder.generate([ids], max_new_tokens=count, temperature=0, stop_at_eos=False)

    def prefill(self, ids: Ids) -> float:
        start = time.perf_counter()
        self._generate(ids, 1)
        return time.perf_counter() - start

    def decode(self, ids: Ids, count: int) -> tuple[float, Ids]:
        result = self._generate(ids, count)
        return result.timings.decode, list(result.tokens[0])


def serve(engine: Engine) -> None:
    """Answers requests, a JSON object per line, until stdin ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not end up between the answers
    print(json.dumps({"vocab": engine.vocab, "about": engine.about}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prefill":
            answer: dict[str, Any] = {"seconds": engine.prefill(request["ids"])}
        else:
            seconds, tokens = engine.decode(request["ids"], request["count"])
            answer = {"seconds": seconds, "tokens": tokens}
        print(json.dumps(answer), file=out, flush=True)


class Worker:
    """An engine in another process."""

    def __init__(self, python: str, name: str, options: argparse.Namespace) -> None:
        command = [
            python,
            __file__,
            options.model,
            "--worker",
            name,
            "--threads",
            str(options.threads),
        ]
        command += [
            "--context",
            str(options.context),
            "--act",
            options.act,
            "--kv-dtype",
            options.kv_dtype,
        ]
        # A file, not a pipe: llama.cpp logs more than a pipe that nobody reads would hold.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        hello = self._read()
        self.vocab: int = hello["vocab"]
        self.about: dict[str, Any] = hello["about"]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SystemExit(f"a worker ended:\n{self._errors.read()[-2000:]}")
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def common_prefix(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


def measure(workers: dict[str, Worker], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result: tokens per second of each engine for prefill and decode."""
    from record import summary

    rng = random.Random(0)
    vocab = min(worker.vocab for worker in workers.values())

    def prompt(length: int) -> Ids:
        return [rng.randrange(vocab) for _ in range(length)]

    rows = []
    plans = [(f"prefill {n}", "prefill", n, n) for n in options.prefill]
    plans.append((f"decode {options.decode}", "decode", 32, options.decode - 1))
    for what, do, length, tokens in plans:
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(options.rounds + 1):  # the first round warms up
            ids = prompt(length)
            order = list(workers) if turn % 2 else list(workers)[::-1]
            for name in order:
                time.sleep(options.pause)  # spinning threads of the other engine go to sleep
                answer = workers[name].ask(do=do, ids=ids, count=options.decode)
                if turn:
                    speeds[name].append(tokens / answer["seconds"])
        rows.append({"what": what, **{name: summary(values) for name, values in speeds.items()}})
        line = ", ".join(f"{name} {rows[-1][name]['median']:.1f}" for name in workers)
        print(f"{what}: {line} tok/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="GGUF file or PACKAGE:FILE")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter with llama-cpp-python"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--act", default="int8")
    parser.add_argument(
        "--kv-dtype", default="float16", help="of qkernels; llama.cpp's default is float16"
    )
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns")
    parser.add_argument("--name", help="name of the result file; default: peer-<model>")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", choices=("qkernels", "llama_cpp"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.worker == "llama_cpp":
        serve(LlamaCpp(options.model, options.threads, options.context))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if options.worker == "qkernels":
        serve(
            Qkernels(options.model, options.threads, options.context, options.act, options.kv_dtype)
        )
        return

    import record

    from qkernels.cli.source import model_path

    path = model_path(options.model)
    options.model = str(path)
    workers = {
        "qkernels": Worker(sys.executable, "qkernels", options),
        "llama_cpp": Worker(options.peer_python, "llama_cpp", options),
    }
    try:
        ids = [random.Random(1).randrange(1000) for _ in range(32)]
        tokens = [
            worker.ask(do="decode", ids=ids, count=32)["tokens"] for worker in workers.values()
        ]
        same = common_prefix(*tokens)
        print(f"greedy tokens agree for {same} of 32")
        rows = measure(workers, options)
    finally:
        for worker in workers.values():
            worker.close()
    if not options.no_write:
        engines = {name: worker.about for name, worker in workers.items()}
        body = {"model": path.name, "bytes": path.stat().st_size, "engines": engines}
        body |= {"greedy_tokens_in_common": same, "of": 32, "rows": rows}
        name = options.name or f"peer-{path.stem.lower()}"
        print(record.write(name, "peer", options.threads, body))


if __name__ == "__main__":
    main()
