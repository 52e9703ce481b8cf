"""A decoder whose matrices have their columns in act-order, as checkpoints of GPTQ have."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_decoder import RAW, Random

import qkernels as qk
from qkernels.loading import Checkpoint, load_hf
from qkernels.nn import QuantDecoder
from qkernels.nn.executor import ComposedExecutor, NativeExecutor
from qkernels.nn.pool import KvPool
from qkernels.nn.program import Permute
from qkernels.quant import PackedWeight

SPEC = qk.QuantSpec(4, 32, zero="integer")
IDS = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(8))


def spread(weight: PackedWeight, seed: int) -> PackedWeight:
    """Its codes and scales, the columns spread over the groups at random."""
    plain = weight.unpack()
    order = torch.randperm(plain.k, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.empty(plain.k, dtype=torch.int32)
    g_idx[order] = (torch.arange(plain.k) // plain.spec.group(plain.k)).int()
    return replace(plain, spec=replace(plain.spec, act_order=True), g_idx=g_idx).pack()


def checkpoint(seed: int = 0, table: bool = False) -> Checkpoint:
    """q and k of a layer share an order, v has its own; so do gate and up."""
    loaded = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))
    shared = {"q": 1, "k": 1, "v": 2, "o": 3, "gate": 4, "up": 4, "down": 5}
    for name, weight in loaded.weights.items():
        of = shared.get(name.split(".")[-2])
        if isinstance(weight, PackedWeight) and (of is not None or table):
            loaded.weights[name] = spread(weight, seed + (of or 0))
    return loaded


def make(act: str = "int8", **options) -> QuantDecoder:
    return QuantDecoder(checkpoint(**options), act=act, kv_dtype="float32")


def dense(decoder: QuantDecoder) -> QuantDecoder:
    """The same values as float matrices."""
    loaded = checkpoint()
    loaded.weights = {
        name: w.dequantize() if isinstance(w, PackedWeight) else w
        for name, w in decoder.weights().items()
        if not name.startswith("rope")
    }
    return QuantDecoder(loaded, act="float", kv_dtype="float32")


@pytest.mark.parametrize("act", ["int8", "float"])
def test_act_order_runs_natively_and_as_the_composed_ops_do(act: str) -> None:
    decoder = make(act)
    assert decoder.composed_because() is None
    assert isinstance(decoder.executor(), NativeExecutor)
    native = decoder(IDS).logits
    with qk.backend("reference"):  # any backend but "cpu" makes it run op by op
        assert isinstance(decoder.executor(), ComposedExecutor)
    composed = ComposedExecutor(decoder.lowered(), decoder.weights())
    decoder._executor = (qk.backends.current(), composed)
    assert torch.equal(decoder(IDS).logits, native)


def test_float_activations_give_the_logits_of_dense_weights() -> None:
    decoder = make("float")
    expected = dense(decoder)(IDS).logits
    # Both accumulate in float32: a few of its roundings apart.
    assert (decoder(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_int8_activations_are_those_of_a_weight_in_natural_order() -> None:
    """As far from float ones as without act-order: a wrong column would be further by far."""
    plain = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32))

    def error(loaded: Checkpoint) -> float:
        ours = QuantDecoder(loaded, act="int8", kv_dtype="float32")(IDS).logits
        exact = QuantDecoder(loaded, act="float", kv_dtype="float32")(IDS).logits
        return float((ours - exact).square().mean().sqrt() / exact.std())

    assert 0 < error(checkpoint()) < 2 * error(plain)


def test_info_says_that_activations_are_int8() -> None:
    decoder = make()
    layers = [x for x in qk.info(decoder).layers if x.op != "embedding"]
    assert {(x.op, x.act, x.row) for x in layers} == {("linear_quant", "int8", "cpu")}
    assert "one native call per step" in str(qk.info(decoder))


def test_a_table_in_act_order_runs_op_by_op() -> None:
    decoder = make(table=True)
    assert decoder.composed_because() == "embed.weight, the table, has its columns in act-order"
    steps = decoder.executor().steps
    assert any(isinstance(s, Permute) and s.order == "embed.weight" for s in steps)
    float_logits = make("float", table=True)(IDS).logits
    assert (decoder(IDS).logits - float_logits).square().mean() < 0.01 * float_logits.var()


def test_another_order_takes_effect_when_it_is_loaded() -> None:
    decoder, other = make(seed=0), make(seed=10)
    before, wanted = decoder(IDS).logits, other(IDS).logits
    assert not torch.equal(before, wanted)
    twin = copy.deepcopy(decoder)
    decoder.load_state_dict(other.state_dict())
    assert torch.equal(decoder(IDS).logits, wanted)
    assert torch.equal(twin(IDS).logits, before)


def test_decoding_continues_a_prompt() -> None:
    decoder = make()
    pool = KvPool(decoder, [IDS.shape[1]])
    handle = pool.add()
    steps = [pool.forward([(handle, [i])], last_only=True)[0] for i in IDS[0].tolist()]
    torch.testing.assert_close(torch.stack(steps), decoder(IDS[:1]).logits[0], atol=1e-4, rtol=0)
