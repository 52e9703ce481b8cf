"""Stands for llama-cpp-python's module of that name: as much of its C functions as bench/engines.py
calls, over a "model" whose next token is the sum of what it has seen."""

from __future__ import annotations

import ctypes
import shutil
import sys
from types import SimpleNamespace
from typing import Any

__version__ = "0.0.fake"
LLAMA_FTYPE_MOSTLY_Q4_0 = 2
VOCAB = 400

llama_token = ctypes.c_int32


class _QuantizeParams(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
    ]


def llama_backend_init() -> None:
    print("to stdout, as a C library may", flush=True)


def llama_model_default_params() -> Any:
    return SimpleNamespace(n_gpu_layers=99)


def llama_load_model_from_file(path: bytes, params: Any) -> Any:
    assert params.n_gpu_layers == 0
    with open(path, "rb") as file:
        return "model" if file.read(4) == b"GGUF" else None


def llama_context_default_params() -> Any:
    return SimpleNamespace()


def llama_new_context_with_model(model: Any, params: Any) -> Any:
    assert params.n_threads == params.n_threads_batch
    return SimpleNamespace(room=params.n_ctx, seen=[])


def llama_model_get_vocab(model: Any) -> Any:
    return model


def llama_vocab_n_tokens(vocab: Any) -> int:
    return VOCAB


def llama_print_system_info() -> bytes:
    return b"FAKE = 1"


def llama_batch_get_one(tokens: Any, count: int) -> list[int]:
    return list(tokens)[:count]


def llama_decode(context: Any, batch: list[int]) -> int:
    context.seen += batch
    return int(len(context.seen) > context.room)


def llama_get_logits_ith(context: Any, index: int) -> Any:
    logits = (ctypes.c_float * VOCAB)()
    logits[sum(context.seen) % VOCAB] = 1.0
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))


def llama_get_memory(context: Any) -> Any:
    return context


def llama_memory_clear(memory: Any, data: bool) -> None:
    memory.seen.clear()


def llama_model_quantize_default_params() -> Any:
    return _QuantizeParams()


def llama_model_quantize(source: bytes, target: bytes, params: Any) -> int:
    """Copies: what it was asked for is in the name of the copy."""
    given = ctypes.cast(params, ctypes.POINTER(_QuantizeParams)).contents
    if not given.allow_requantize or given.ftype != LLAMA_FTYPE_MOSTLY_Q4_0:
        print("refused", file=sys.stderr)
        return 1
    shutil.copy(source, target)
    return 0
