"""The decode step of transformers' `generate`, compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import list_backends, lookup_backend, register_backend
from transformers import CompileConfig

from .merged import merged
from .rotary import fold_rotary

# Our ops have their autograd formulas in Python, which costs a call as much as the kernel does. A
# decode step has no use for them, so our backends call what another one compiled below autograd.
PREFIX = "qkernels_"
# What a step of so many small calls can do without: 30 layers check 1000 shapes per token.
# And what is left for its kernels beside ours, rows of a few thousand elements, is done before a
# second thread has started.
INDUCTOR = {"size_asserts": False, "alignment_asserts": False, "cpp.threads": 1}

# Graphs that one model class may have at a time, two for every batch size and every change of a
# model. Torch's own limit of 8 is an error where the whole step has to be one graph.
LIMIT = 128


@dataclass(eq=False)
class _Graph:
    """One graph of a decode step: the code that Dynamo traced, None if it holds constants that the
    code does not show, and what the backend made of it; `again` does not look for changes of the
    model."""

    code: str | None
    run: Callable[..., Any]
    again: Callable[..., Any]


class _Ran(threading.local):
    """The graphs that this thread ran, while somebody wants to know."""

    graphs: list[_Graph] | None = None


_ran = _Ran()


def _without_autograd(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    return call


def _registered(backend: str) -> str:
    """The name of a backend of torch.compile that does what `backend` does, below autograd, and
    says which graph ran."""
    name = PREFIX + backend
    if name not in list_backends(exclude_tags=()):
        inner = lookup_backend(backend)
        fixed = {"config_patches": INDUCTOR} if backend == "inductor" else {}

        def compile_graph(traced: Any, inputs: Any, **options: Any) -> Any:
            code = None if any(n.op == "get_attr" for n in traced.graph.nodes) else traced.code

            def compiled(traced: Any, inputs: Any) -> Any:
                return inner(traced, inputs, **fixed, **options)

            fold_rotary(traced)
            run, again = map(_without_autograd, merged(traced, inputs, compiled))
            graph = _Graph(code, run, again)

            def call(*args: Any) -> Any:
                if _ran.graphs is not None:
                    _ran.graphs.append(graph)
                return graph.run(*args)

            return call

        register_backend(compile_graph, name=name)
    return name


def _of_a_step(guards: Any) -> list[bool]:
    """Which guards are on what changes between the steps of an answer."""
    modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [
        kept and not guard.is_global and "past_key_values" not in guard.name
        for kept, guard in zip(modules, guards, strict=True)
    ]


class _Step:
    """The compiled step of a model, as the calls of `generate` use it.

    Dynamo looks at 10,000 properties of the modules before every call, for which a small model
    takes as long as for its matrices. Within one answer model and cache stay the objects that they
    are, so only the first step of an answer has them all looked at (`whole`). The graph that it ran
    is traced once more with the checks of the other arguments alone (`quick`), and serves the other
    steps.
    """

    def __init__(self, model: Any, backend: str, fullgraph: bool, dynamic: bool | None) -> None:
        self.model, self.backend = model, lookup_backend(backend)
        self.options: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": dynamic}
        self.whole = torch.compile(model.__call__, backend=backend, **self.options)
        self.quick: dict[_Graph, Callable[..., Any]] = {}

    def quick_for(self, graph: _Graph) -> Callable[..., Any]:
        """A call of the model that takes `graph` to be its step."""
        if graph not in self.quick:

            def compile_graph(traced: Any, inputs: Any) -> Any:
                return graph.again if traced.code == graph.code else self.backend(traced, inputs)

            self.quick[graph] = torch.compile(
                self.model.__call__,
                backend=compile_graph,
                options={"guard_filter_fn": _of_a_step},
                **self.options,
            )
        return self.quick[graph]

    def answer(self) -> Callable[..., Any]:
        """What one call of `generate` calls for each of its steps."""
        chosen: Callable[..., Any] | None = None
        settled = False

        def first(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            graphs = _ran.graphs = []
            try:
                out = self.whole(*args, **kwargs)
            finally:
                _ran.graphs = None
            one = len(graphs) == 1 and graphs[0].code is not None
            chosen = self.quick_for(graphs[0]) if one else self.whole
            return out

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal settled
            if settled:
                assert chosen is not None
                return chosen(*args, **kwargs)
            settled = chosen is not None
            with torch._dynamo.config.patch(recompile_limit=LIMIT):
                return (chosen or first)(*args, **kwargs)

        return step


class _CompiledCall:
    """`PreTrainedModel.get_compiled_call` of a model, which `generate` asks once per answer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: dict[tuple[Any, ...], _Step] = {}

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        backend = getattr(compile_config, "backend", None)
        if not (isinstance(backend, str) and backend.startswith(PREFIX)):
            theirs: Callable[..., Any] = type(self.model).get_compiled_call(
                self.model, compile_config
            )
            return theirs
        how = backend, compile_config.fullgraph, compile_config.dynamic
        if how not in self.steps:
            self.steps[how] = _Step(self.model, *how)
        return self.steps[how].answer()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy compiles its own."""
        return type(self), (self.model,)


def compile_decode(model: Any, backend: str = "inductor", *, fullgraph: bool = True) -> Any:
    """Has `model.generate` compile its decode step, on a CPU too, from now on; returns the model.

        qk.hf.compile_decode(model)
        cache = qk.hf.QuantizedStaticCache(model.config, max_cache_len=2048)
        model.generate(**inputs, past_key_values=cache)

    It takes a cache of fixed size: this one or transformers' StaticCache; with others `generate`
    goes on as before, with a warning. The first answer waits for the compiler: with "inductor", for
    a C++ compiler, minutes for a large model; the result is kept on disk for later processes.
    backend "eager" needs no compiler: it replays the operations of the step without the modules
    and, as "inductor" does, joins linear layers of one input and folds the rotary embedding.
    The prompt's forward pass is never compiled. A batch of a second size (the graph then made
    serves all others), and a model that was changed since its last answer, are compiled anew; a
    change of the modules while an answer is being made may be seen in part, or not before the next
    one. Where the model's rotary embedding is the usual
    one it is computed in float32 and rounded once, so 16-bit logits differ by rounding.

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
    model.get_compiled_call = _CompiledCall(model)
    return model
