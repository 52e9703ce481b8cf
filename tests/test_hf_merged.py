"""Linear layers of a compiled graph that read one input become one call, whose parts stay the
tensors of the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from hf_tiny import generate, tiny

import qkernels as qk
import qkernels.hf as hf
from qkernels.hf.merged import LINEAR, merged
from qkernels.nn import QuantLinear

COLUMNS = 256


class Layers(torch.nn.Module):
    """Layers of one input: their results side by side."""

    def __init__(self, layers: list[QuantLinear]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def layer(
    n: int, spec: Any = "W8A8", *, seed: int = 0, bias: bool = False, act: str = "int8"
) -> QuantLinear:
    torch.manual_seed(seed)
    dense = torch.nn.Linear(COLUMNS, n, bias)
    return QuantLinear.from_linear(dense, spec, act=act)


def compiled(module: torch.nn.Module) -> tuple[Callable[..., Any], list[int]]:
    """The module compiled with its layers merged, and how many calls each graph has."""
    counts: list[int] = []

    def run_as_it_is(traced: Any, inputs: Any) -> Any:
        counts.append(len(traced.graph.find_nodes(op="call_function", target=LINEAR)))
        return traced

    torch._dynamo.reset()
    backend = lambda traced, inputs: merged(traced, inputs, run_as_it_is)[0]  # noqa: E731
    return torch.compile(module, backend=backend, fullgraph=True), counts


def agree(found: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("number", range(len(cases.LINEAR_SPECS)))
@torch.no_grad()
def test_one_call_for_every_format(number: int) -> None:
    name = list(cases.LINEAR_SPECS)[number]
    spec, act = cases.LINEAR_SPECS[name], ("int8", "float")[number % 2]
    module = Layers([])
    for i, n in enumerate((64, 100, 30)):
        plain = cases.random_plain(spec, n, COLUMNS, torch.Generator().manual_seed(i))
        module.layers.append(QuantLinear(plain.pack(), act=act))
    call, counts = compiled(module)
    x = torch.randn(2, 1, COLUMNS)
    assert agree(call(x), module(x))
    # An order of columns belongs to one layer.
    assert counts[0] == (3 if spec.act_order else 1)


@torch.no_grad()
def test_biases_are_joined_where_the_rows_fill_blocks() -> None:
    x = torch.randn(1, 1, COLUMNS)
    for sizes, calls in (((64, 128, 64), 1), ((64, 100, 64), 2)):
        module = Layers([layer(n, bias=True, seed=i) for i, n in enumerate(sizes)])
        call, counts = compiled(module)
        assert agree(call(x), module(x)) and counts == [calls]


@torch.no_grad()
def test_what_differs_stays_apart() -> None:
    """Formats, ways of activations, layers with and without a bias, a layer used twice."""
    twice = layer(64, seed=9)
    module = Layers([
        layer(64, seed=1), layer(64, "W4A8", seed=2), layer(64, act="float", seed=3),
        layer(64, bias=True, seed=4), twice, twice, layer(64, seed=5),
    ])  # fmt: skip
    call, counts = compiled(module)
    x = torch.randn(1, 1, COLUMNS)
    assert agree(call(x), module(x))
    assert counts == [6]  # the two plain ones that are used once are one


class Shared(torch.nn.Module):
    """Two layers, and a reader of the first one's codes beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layer(64, seed=i) for i in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [*(layer(x) for layer in self.layers), self.layers[0].weight.float().sum(0)]


@torch.no_grad()
def test_a_weight_that_others_read_stays_where_it_is() -> None:
    module = Shared()
    call, counts = compiled(module)
    x = torch.randn(1, 1, COLUMNS)
    assert agree(call(x), module(x)) and counts == [2]


class Changing(torch.nn.Module):
    """The second layer sees what an operation in place left of the first one's input."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = layer(64, seed=1), layer(64, seed=2)
        self.change = change

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x * 2
        first = self.first(x)
        self.change(x)
        return [first, self.second(x)]


def _assign(x: torch.Tensor) -> None:
    x[..., 0] = 3.0


def _add(x: torch.Tensor) -> None:
    x += 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(3),
        lambda x: x.view(-1).mul_(3),
        lambda x: torch.relu_(x),
        lambda x: torch.nn.functional.relu(x, inplace=True),
        lambda x: torch.nn.functional.dropout(x, 0.0, True, True).mul_(3),
        lambda x: torch._foreach_mul_([x], 3),
        lambda x: torch.squeeze(input=x).mul_(3),
        lambda x: torch.add(x, 1, out=x),
        _assign,
        _add,
    ],
)
@torch.no_grad()
def test_an_input_that_is_written_to_is_read_twice(change: Callable[[Any], Any]) -> None:
    module = Changing(change)
    call, counts = compiled(module)
    x = torch.randn(1, 1, COLUMNS)
    found = call(x)
    assert counts == [2]
    assert agree(found, module(x)) and not torch.equal(*found)


@torch.no_grad()
def test_layers_keep_their_tensors() -> None:
    """Changed in place, replaced, moved away: the next call sees it. Copies have their own."""
    module = Layers([layer(64, seed=i) for i in range(3)])
    before = copy.deepcopy(module)
    call, counts = compiled(module)
    x = torch.randn(1, 1, COLUMNS)
    call(x)
    weights = [m.weight for m in module.layers]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert [w.data_ptr() - weights[0].data_ptr() for w in weights] == [
        i * weights[0].nbytes for i in range(3)
    ]
    assert agree(module(x), before(x))
    module.layers[1].weight.neg_()
    assert agree(call(x), module(x)) and not agree(module(x), before(x))
    module.layers[2].weight = torch.nn.Parameter(module.layers[0].weight.clone(), False)
    module.layers[0].weight.data = module.layers[1].weight.clone()
    assert agree(call(x), module(x)) and agree(call(x), module(x))
    module.layers[1].scale.mul_(2)
    assert agree(call(x), module(x))
    other = copy.deepcopy(module)
    module.layers[1].weight.zero_()
    assert other.layers[1].weight.any()
    assert counts == [1]


class Chained(torch.nn.Module):
    """Groups behind each other, on rows that nobody reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layer(COLUMNS, seed=i) for i in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        a, b, c, d = self.layers
        first = a(x)
        return [b(x), c(first), d(first)]


@torch.no_grad()
def test_groups_behind_each_other() -> None:
    module = Chained()
    call, counts = compiled(module)
    for x in (torch.randn(1, COLUMNS), torch.randn(3, COLUMNS)):
        assert agree(call(x), module(x))
    assert set(counts) == {2}


def test_inference_mode_leaves_the_weights_as_they_are() -> None:
    module = Layers([layer(64, seed=i) for i in range(3)])
    call, counts = compiled(module)
    x = torch.randn(1, 1, COLUMNS)
    with torch.inference_mode():
        assert agree(call(x), module(x))
    assert not any(t.is_inference() for t in module.state_dict().values())
    with torch.no_grad():
        assert agree(call(x), module(x))
    assert set(counts) == {1}


@torch.no_grad()
def test_another_graph_takes_the_places_that_there_are() -> None:
    """For another number of rows nothing moves again, which would move it back for the first."""
    module = Layers([layer(64, seed=i) for i in range(3)])
    call, counts = compiled(module)
    call(torch.randn(1, 1, COLUMNS))
    places = [t.data_ptr() for t in module.state_dict().values()]
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for rows in (2, 1, 3):
            x = torch.randn(1, rows, COLUMNS)
            assert agree(call(x), module(x))
            assert [t.data_ptr() for t in module.state_dict().values()] == places
    assert len(counts) == 3


@torch.no_grad()
def test_one_graph_serves_two_models_each_with_its_own() -> None:
    modules = [Layers([layer(64, seed=3 * m + i) for i in range(3)]) for m in range(2)]
    truths = [copy.deepcopy(m) for m in modules]
    counts: list[int] = []

    def backend(traced: Any, inputs: Any) -> Any:
        counts.append(1)
        return merged(traced, inputs, lambda traced, inputs: traced)[0]

    torch._dynamo.reset()
    calls = [torch.compile(m, backend=backend, fullgraph=True) for m in modules]
    x = torch.randn(1, 1, COLUMNS)
    for _ in range(2):
        for call, module, truth in zip(calls, modules, truths, strict=True):
            assert agree(call(x), truth(x)) and agree(module(x), truth(x))
    assert counts == [1]


class FirstAndLater:
    """Modules compiled to the two callables of the first graph, of which `later` takes the second;
    graphs counts all."""

    def __init__(self, modules: list[Layers]) -> None:
        torch._dynamo.reset()
        self.graphs: list[tuple[Callable[..., Any], ...]] = []
        self.later = False
        self.calls = [torch.compile(m, backend=self._backend, fullgraph=True) for m in modules]

    def _backend(self, traced: Any, inputs: Any) -> Any:
        self.graphs.append(merged(traced, inputs, lambda traced, inputs: traced))
        return lambda *args: self.graphs[0][self.later](*args)


@torch.no_grad()
def test_the_calls_after_the_first_do_not_look() -> None:
    """They compute with the tensors that were there, until a first call looks again; of a model
    that they never saw they take its own."""
    modules = [Layers([layer(64, seed=3 * m + i) for i in range(3)]) for m in range(2)]
    module, other = modules
    both = FirstAndLater(modules)
    compiled, of_the_other = both.calls
    x = torch.randn(1, 1, COLUMNS)
    before = module(x)
    assert agree(compiled(x), before)
    both.later = True
    module.layers[0].weight.neg_()  # in its place
    changed = module(x)
    assert agree(compiled(x), changed) and not agree(changed, before)
    module.layers[0].weight.data = module.layers[0].weight.neg()  # in another one
    assert agree(module(x), before) and agree(compiled(x), changed)
    assert agree(of_the_other(x), other(x))
    both.later = False
    assert agree(compiled(x), before)
    both.later = True
    assert agree(compiled(x), before) and len(both.graphs) == 1


@torch.no_grad()
def test_models_that_share_a_layer_keep_their_own_others() -> None:
    shared = layer(64, seed=9)
    modules = [Layers([shared, *(layer(64, seed=2 * m + i) for i in range(2))]) for m in range(2)]
    both = FirstAndLater(modules)
    x = torch.randn(1, 1, COLUMNS)
    truths = [module(x) for module in modules]
    for both.later, m in ((False, 0), (True, 0), (False, 1), (True, 0), (True, 1)):
        assert agree(both.calls[m](x), truths[m]) and agree(modules[m](x), truths[m])


def test_a_model_is_saved_as_before(tmp_path: Path) -> None:
    """After its steps were compiled: no more memory, and saved and reloaded bit for bit."""
    model = tiny("llama", quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    truth = {name: value.clone() for name, value in model.state_dict().items()}
    cache = hf.QuantizedStaticCache(model.config, 64, "int8")
    tokens = generate(model, "none", 8, past_key_values=cache)
    cache.reset()
    torch._dynamo.reset()
    hf.compile_decode(model, "eager")
    assert torch.equal(generate(model, "none", 8, past_key_values=cache), tokens)

    block = model.model.layers[0]
    joined = (
        (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
        (block.mlp.gate_proj, block.mlp.up_proj),
    )
    for modules in joined:
        storages = {m.weight.untyped_storage().data_ptr(): m for m in modules}
        (kept,) = storages.values()
        assert kept.weight.untyped_storage().nbytes() == sum(m.weight.nbytes for m in modules)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    for name, value in truth.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(again.state_dict()[name], value)
    qk.dequantize_(model)
    cache.reset()
    found = generate(model, "none", 8, past_key_values=cache)
    assert found.shape == tokens.shape
    torch._dynamo.reset()
