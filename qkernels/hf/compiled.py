"""The decode step of transformers' `generate`, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import list_backends, lookup_backend, register_backend
from transformers import CompileConfig

# Our ops have their autograd formulas in Python, which costs a call as much as the kernel does. A
# decode step has no use for them, so our backends call what another one compiled below autograd.
PREFIX = "qkernels_"
# What a step of so many small calls can do without: 30 layers check 1000 shapes per token.
INDUCTOR = {"size_asserts": False, "alignment_asserts": False}


def _without_autograd(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    return call


def _registered(backend: str) -> str:
    """The name of a backend of torch.compile that does what `backend` does, below autograd."""
    name = PREFIX + backend
    if name not in list_backends(exclude_tags=()):
        inner = lookup_backend(backend)
        fixed = {"config_patches": INDUCTOR} if backend == "inductor" else {}

        def compile_graph(graph: Any, inputs: Any, **options: Any) -> Any:
            return _without_autograd(inner(graph, inputs, **fixed, **options))

        register_backend(compile_graph, name=name)
    return name


def compile_decode(model: Any, backend: str = "inductor", *, fullgraph: bool = True) -> Any:
    """Has `model.generate` compile its decode step, on a CPU too, from now on; returns the model.

        qk.hf.compile_decode(model)
        cache = qk.hf.QuantizedStaticCache(model.config, max_cache_len=2048)
        model.generate(**inputs, past_key_values=cache)

    It takes a cache of fixed size: this one or transformers' StaticCache; with others `generate`
    goes on as before, with a warning. The first answer waits for the compiler: with "inductor", for
    a C++ compiler, minutes for a large model; the result is kept on disk for later processes.
    backend "eager" needs no compiler: it replays the operations of the step without the modules.
    The prompt's forward pass is never compiled. A batch of another size is compiled anew.

    model: of transformers, with `generate`. backend: of torch.compile. fullgraph: a part that
    cannot be compiled is an error. Raises TypeError for a model without `generate`, ValueError for
    a backend that torch does not know.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "generate"):
        raise TypeError(
            f"compile_decode: expected a transformers model that generates, got "
            f"{type(model).__name__}"
        )
    known = list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile_decode: backend must be one of {known}, got {backend!r}")
    compiled = CompileConfig(fullgraph=fullgraph, backend=_registered(backend), mode="default")
    # Without it, `generate` compiles on accelerators only.
    if not hasattr(compiled, "_compile_all_devices"):
        raise RuntimeError(
            "compile_decode: this transformers has no way to compile on a CPU "
            "(CompileConfig._compile_all_devices)"
        )
    compiled._compile_all_devices = True  # type: ignore[assignment]
    config.compile_config = compiled
    return model
