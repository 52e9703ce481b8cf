"""The engines that `peer_llama_cpp.py` and `race.py` put side by side, each run as a worker.

    PYTHON engines.py serve {qkernels,llama_cpp} MODEL [--threads N] [--context N] [--act A]
        [--kv-dtype T]
    PYTHON engines.py quantize MODEL TARGET TYPE [--threads N]

The second has llama.cpp's quantizer write MODEL as another type, for example Q4_0, even where MODEL
is quantized already. PYTHON needs only what the engine itself needs.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent))

from workers import Message, serve

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
    """llama.cpp through the C functions that llama-cpp-python binds, without the sampling chain and
    the copies of its class `Llama`."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp
        import numpy

        self._c, self._np = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        start = time.perf_counter()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_load_model_from_file(path.encode(), model)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context  # n_ubatch stays at its default, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_new_context_with_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {context} tokens for {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.about = {
            "name": "llama.cpp",
            "llama-cpp-python": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "load_seconds": round(time.perf_counter() - start, 3),
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
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import torch

        import qkernels

        torch.set_num_threads(threads)
        self._decoder = qkernels.QuantDecoder.from_pretrained(
            path, act=act, kv_dtype=kv_dtype, max_seq_len=context
        )
        self.vocab = self._decoder.config.vocab
        self.about = {
            "name": "qkernels",
            "act": act,
            "kv_dtype": kv_dtype,
            "isa": torch.ops.qkernels.cpu_isa(),
            "load_seconds": round(self._decoder.load_seconds, 3),
        }

    def _generate(self, ids: Ids, count: int) -> Any:
        return self._decoder.generate([ids], max_new_tokens=count, temperature=0, stop_at_eos=False)

    def prefill(self, ids: Ids) -> float:
        start = time.perf_counter()
        self._generate(ids, 1)
        return time.perf_counter() - start

    def decode(self, ids: Ids, count: int) -> tuple[float, Ids]:
        result = self._generate(ids, count)
        return result.timings.decode, list(result.tokens[0])


def answers(engine: Engine, request: Message) -> Message:
    """{"do": "prefill", "ids"} or {"do": "decode", "ids", "count"} to {"seconds", "tokens"}."""
    if request["do"] == "prefill":
        return {"seconds": engine.prefill(request["ids"])}
    seconds, tokens = engine.decode(request["ids"], request["count"])
    return {"seconds": seconds, "tokens": tokens}


def quantize(source: str, target: str, kind: str, threads: int) -> None:
    """Has llama.cpp write `source` as `kind`, with its own choice of types per tensor."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if ftype is None:
        raise SystemExit(f"llama.cpp has no type {kind!r}; expected one such as Q4_0 or Q4_K_M")
    params.ftype, params.nthread, params.allow_requantize = ftype, threads, True
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize returned {code} for {source} as {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("serve")
    one.add_argument("engine", choices=("qkernels", "llama_cpp"))
    one.add_argument("model")
    one.add_argument("--context", type=int, default=1024)
    one.add_argument("--act", default="int8")
    one.add_argument("--kv-dtype", default="float16")
    other = commands.add_parser("quantize")
    for name in ("model", "target", "type"):
        other.add_argument(name)
    for command in (one, other):
        command.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    if o.command == "quantize":
        quantize(o.model, o.target, o.type, o.threads)
        return

    def start() -> tuple[Message, Callable[[Message], Message]]:
        if o.engine == "llama_cpp":
            engine: Engine = LlamaCpp(o.model, o.threads, o.context)
        else:
            engine = Qkernels(o.model, o.threads, o.context, o.act, o.kv_dtype)
        hello = {"vocab": engine.vocab, "about": engine.about}
        return hello, lambda request: answers(engine, request)

    serve(start)


if __name__ == "__main__":
    main()
