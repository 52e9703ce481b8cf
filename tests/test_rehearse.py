"""Rehearsals: blank weights in place of a model's, its program on them, and plans made of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from gguf_writer import write_llama

import qkernels.rehearse as rehearsal_module
from qkernels.estimate import Estimate
from qkernels.machines import Machine, this_cpu
from qkernels.nn.decoder import QuantDecoder
from qkernels.nn.pool import KvPool
from qkernels.outline import outline
from qkernels.plan import plan
from qkernels.quant import PackedWeight, QuantSpec
from qkernels.rehearse import Rehearsal, blank_bytes, blank_weights, rehearse, shared_sets

HERE = Machine("here", "cpu", 8 * 10**9, 3 * 10**8, 4e10, 1e12, 2e11, "made up", here=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("rehearse") / "tiny.gguf", context=4096)


def estimate(path: Path, machine: Machine = HERE, **kinds: Any) -> Estimate:
    how = {"act": "auto", "dtype": "auto", "kv_dtype": "auto", "context": 1024, "quantizes": False}
    return Estimate(outline(path), machine, **{**how, **kinds})


def layers(count: int) -> dict[str, Any]:
    """A table, and layers with a matrix of 8320 bytes each, the last one of another format."""
    meta = {"device": torch.device("meta")}
    out: dict[str, Any] = {"embed.weight": torch.empty(100, 64, **meta)}
    for i in range(count):
        spec = QuantSpec.from_scheme("W8A8" if i < count - 1 else "W4A8", group_size=64)
        out[f"layers.{i}.q.weight"] = PackedWeight.empty(spec, 128, 64, meta["device"])
        out[f"layers.{i}.norm.weight"] = torch.empty(64, **meta)
    return out


def test_layers_take_turns_with_as_much_as_is_asked_for() -> None:
    weights = layers(9)
    per_layer = weights["layers.0.q.weight"].nbytes + 64 * 4
    sets = shared_sets(weights, 3 * per_layer)
    taken = [sets[f"layers.{i}.q.weight"][1] for i in range(9)]
    # Of 8 alike, those that are a third of all; the ninth is of another format.
    assert taken[:8] == [0, 1, 2, 0, 1, 2, 0, 1] and taken[8] == 0
    assert sets["embed.weight"][1] == 0
    blank = blank_weights(weights, 3 * per_layer)
    assert list(blank) == list(weights)
    for name, weight in weights.items():
        made = blank[name]
        assert type(made) is type(weight) and made.nbytes == weight.nbytes
        if isinstance(weight, PackedWeight):
            assert (made.spec, made.n, made.k) == (weight.spec, weight.n, weight.k)
    assert blank["layers.0.q.weight"] is blank["layers.3.q.weight"]
    assert blank["layers.0.q.weight"] is not blank["layers.1.q.weight"]
    distinct = {id(w): w.nbytes for w in blank.values()}
    assert blank_bytes(weights, 3 * per_layer) == sum(distinct.values())
    least = 3 * per_layer
    assert least <= sum(distinct.values()) - blank["embed.weight"].nbytes < 2 * least


def test_small_models_have_all_their_weights() -> None:
    weights = layers(4)
    blank = blank_weights(weights, 1 << 30)
    assert len({id(w) for w in blank.values()}) == len(weights)
    assert blank_bytes(weights, 1 << 30) == sum(w.nbytes for w in weights.values())


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("act", ["int8", "float"])
def test_a_rehearsal_times_the_models_own_steps(act: str, kv_dtype: str, tiny: Path) -> None:
    found = rehearse(estimate(tiny, act=act, kv_dtype=kv_dtype), batch=2, prompt=64)
    assert found is not None
    assert found.batch == 2 and found.prompt == 64
    assert 0 < found.step < 1 and 0 < found.prefill < 1 and found.kv_byte >= 0


@pytest.mark.parametrize("name", list(cases.LINEAR_SPECS))
def test_any_format_can_be_blank(name: str) -> None:
    """K-quants, tables, column orders, small floats as scales: what the loaders make."""
    weight = PackedWeight.empty(cases.LINEAR_SPECS[name], 64, 512, torch.device("meta"))
    made = rehearsal_module._blank(weight)
    assert isinstance(made, PackedWeight)
    assert made.dequantize().abs().max() < 1e-30  # powers of two as scales know no zero


def test_plans_are_made_of_rehearsals(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's seconds are those timed, with the bytes of the context; a prompt's those timed,
    in proportion to what is computed."""
    model = estimate(tiny)
    model.rehearsal = Rehearsal(batch=2, step=0.25, kv_byte=1e-6, prompt=32, prefill=0.5)
    assert model.step_seconds(100, 2) == pytest.approx(0.25 + 2e-6 * model.kv_read(100))
    shorter, longer = model.prompt_seconds(32), model.prompt_seconds(320)
    assert shorter == pytest.approx(0.5) and longer is not None and 5 <= longer < 10
    computed = estimate(tiny).step_seconds(100, 1)
    assert model.step_seconds(100, 1) == computed  # another batch was not tried
    model.machine = replace(model.machine, int8_ops=None, float_ops=None)
    assert model.prompt_seconds(64) == pytest.approx(1.0)

    made = Rehearsal(batch=3, step=0.5, kv_byte=0.0, prompt=16, prefill=0.5)
    asked = []
    monkeypatch.setattr("qkernels.plan.rehearse", lambda model, *args: asked.append(args) or made)
    said = plan(tiny, HERE, context=1024, batch=3, prompt=100)
    assert asked == [(3, 100)] and said.speed.rehearsed and said.speed.decode == 6.0
    assert said.to_dict()["speed"]["rehearsed"] is True
    assert not plan(tiny, replace(HERE, here=False), context=1024).speed.rehearsed


def test_this_machine_is_here_unless_its_bandwidth_is_given() -> None:
    assert this_cpu(measured=False).here
    assert not this_cpu(measured=False, read=1e10).here


def test_without_memory_speeds_are_computed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = estimate(tiny)
    least = blank_bytes(model.checkpoint.weights, 1 << 28)
    monkeypatch.setattr(rehearsal_module, "resident", lambda: 0)
    monkeypatch.setattr(rehearsal_module, "available", lambda: 2 * least)
    assert rehearse(model, 1, 16) is None
    said = plan(tiny, HERE, context=1024)
    assert not said.speed.rehearsed
    assert said.speed == plan(tiny, replace(HERE, here=False), context=1024).speed


def test_what_would_take_long_is_computed(tiny: Path) -> None:
    """A machine that reads the model in 6 s would need 24 s for four steps."""
    model = estimate(tiny)
    model.machine = replace(model.machine, read=sum(model.read_bytes()) / 6)
    assert model.step_seconds(1, 1) > 6
    assert rehearse(model, 1, 16) is None


def test_long_prompts_are_tried_in_part(tiny: Path) -> None:
    model = estimate(tiny, replace(HERE, int8_ops=1e8, float_ops=1e8))
    whole = model.prompt_seconds(1000)
    assert whole is not None
    assert model.rehearsed_prompt(1000, 2 * whole) == 1000
    assert model.rehearsed_prompt(1000, whole / 4) in (249, 250)
    assert model.rehearsed_prompt(1000, whole / 1000) == 32
    assert model.rehearsed_prompt(20, whole / 1000) == 20


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
def test_blank_tokens_are_zeros_in_the_cache(kv_dtype: str, tiny: Path) -> None:
    """Attention to them is a mean of zeros, besides the token itself."""
    decoder = QuantDecoder.from_pretrained(tiny, device="cpu", kv_dtype=kv_dtype, max_seq_len=256)
    pool = KvPool(decoder, [200, 200])
    first, second = pool.add(), pool.add()
    pool.forward([(first, list(range(3, 103)))])
    pool.append_blank(second, 100)
    cache = pool._cache
    assert cache.lengths[second] == 100
    pages = cache.pages(second)
    for stored in (cache.k_pages, cache.v_pages, cache.k_scale, cache.v_scale):
        if stored is not None:
            assert not stored[:, pages].any()
            assert stored[:, cache.pages(first)].any()
