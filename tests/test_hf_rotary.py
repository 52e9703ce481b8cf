"""The rotary embedding in a compiled graph is folded into the op that appends, where it is the one
that the op does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hf_tiny import generate, tiny
from torch import Tensor
from torch.fx import GraphModule

import qkernels.hf as hf
from qkernels.hf import compiled
from qkernels.hf.rotary import APPEND_ATTENTION, fold_rotary
from qkernels.ops.attention import append_attention

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 32, 16


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.library.custom_op("qkernels_test_rotary::scale", mutates_args={"x"})
def _scale_op(x: Tensor) -> None:
    x.mul_(3.0)


@_scale_op.register_fake
def _(x: Tensor) -> None:
    return None


def appends(traced: GraphModule) -> list[torch.fx.Node]:
    return traced.graph.find_nodes(op="call_function", target=APPEND_ATTENTION)


def targets(traced: GraphModule) -> set[str]:
    return {getattr(n.target, "__name__", str(n.target)) for n in traced.graph.nodes}


# ---- graphs made by hand ----


class Step:
    """What a model does from query, key and value on. The methods are what others may do."""

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, T, D]."""
        frequencies = 1.0 / 10 ** (torch.arange(DIM // 2) / 8.0)
        half = positions[:, :, None].float() * frequencies
        both = torch.cat((half, half), dim=-1)
        return both.cos() * 1.5, both.sin() * 1.5

    def turned(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos) + (self.turned(x) * sin)

    def query(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(q, cos, sin)

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, x.shape[1], DIM)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *pages: Tensor
    ) -> Tensor:
        batch, _, tokens, _ = q.shape
        cos, sin = (x.to(q.dtype).unsqueeze(1) for x in self.angles(positions))
        q, k = self.query(q, cos, sin), self.rotate(k, cos, sin)
        rows = map(self.rows, (q, k, v))
        starts = torch.arange(batch + 1, dtype=torch.int32) * tokens
        lengths = torch.full((batch,), 12, dtype=torch.int32)
        table = torch.arange(batch, dtype=torch.int32)[:, None]
        return append_attention(*rows, None, None, starts, lengths, table, *pages)


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    # [B, T, H D], as a linear layer gives them
    rows = torch.randn(batch, tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=g).to(dtype)
    q, k, v = (
        x.unflatten(2, (-1, DIM)).transpose(1, 2)
        for x in rows.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=2)
    )
    positions = torch.randint(0, 50, (batch, tokens), generator=g)
    pages = [torch.randn(batch, KV_HEADS, PAGE, DIM, generator=g) for _ in range(2)]
    return [q, k, v, positions, *pages]


def left(step: Callable[..., Tensor], args: list[Tensor]) -> GraphModule:
    """The graph of a step after `fold_rotary`, which computes what the step does."""
    kept: list[GraphModule] = []

    def backend(traced: GraphModule, _: Any) -> GraphModule:
        fold_rotary(traced)
        kept.append(traced)
        return traced

    ours, theirs = copy.deepcopy(args), copy.deepcopy(args)  # views stay views of one tensor
    found = torch.compile(step, backend=backend, fullgraph=True)(*ours)
    wide = [a.float() if a.is_floating_point() else a for a in theirs]
    truth = step(*wide)
    near = 1e-5 if args[0].dtype == torch.float32 else 4 * 2.0**-8
    torch.testing.assert_close(found.float(), truth, rtol=near, atol=near)
    for a, b in zip(ours[4:], wide[4:], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=near, atol=near)
    assert len(kept) == 1
    return kept[0]


@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_rotates(batch: int, tokens: int, dtype: torch.dtype) -> None:
    traced = left(Step(), inputs(batch, tokens, dtype))
    (node,) = appends(traced)
    assert node.args[3] is not None and node.args[4] is not None
    assert "neg" not in targets(traced)


class Partly(Step):
    """A part of the dims."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part, rest = x[..., : DIM // 2], x[..., DIM // 2 :]
        cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
        return torch.cat((part * cos + self.turned(part) * sin, rest), dim=-1)


class OtherWay(Step):
    def turned(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((x2, -x1), dim=-1)


class Uneven(Step):
    """Not in halves."""

    def turned(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., 8:], x[..., :8]), dim=-1)


class TwoFrequencies(Step):
    """Dims of a pair turn by angles of their own."""

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        both = positions[:, :, None].float() * torch.arange(DIM)
        return both.cos(), both.sin()


class HalvesScaled(Step):
    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().angles(positions)
        scale = torch.arange(DIM) + 1.0
        return cos * scale, sin * scale


class QueryAlone(Step):
    """The key stands at other places."""

    def query(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(q, cos * 2, sin)


class Written(Step):
    """What was rotated is overwritten before it is appended."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.clone()
        out = super().rotate(x, cos, sin)
        x.zero_()
        return out


class WrittenThroughAView(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.clone()
        out = super().rotate(x, cos, sin)
        x[..., :4].mul_(2)
        return out


class WritesItsInput(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = super().rotate(x, cos, sin)
        self.write(x)
        return out

    def write(self, x: Tensor) -> None:
        x.zero_()


class WritesByAnOperator(WritesItsInput):
    def write(self, x: Tensor) -> None:
        x.__iadd__(1.0)


class WritesPastAutograd(WritesItsInput):
    def write(self, x: Tensor) -> None:
        x.data.__imul__(3.0)


class Renormalizes(WritesItsInput):
    def write(self, x: Tensor) -> None:
        rows = torch.zeros(1, dtype=torch.int64)
        torch.nn.functional.embedding(rows, x[0, 0], max_norm=0.1)


class RenormalizesByPlace(WritesItsInput):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *pages: Tensor
    ) -> Tensor:
        self.positions = positions
        return super().__call__(q, k, v, positions, *pages)

    def write(self, x: Tensor) -> None:
        torch.nn.functional.embedding(self.positions[:1] * 0, x[0, 0], None, 0.1)


class WritesByAnOp(WritesItsInput):
    """Of somebody's library, which Dynamo leaves as it is."""

    def write(self, x: Tensor) -> None:
        torch.ops.qkernels_test_rotary.scale(x)


@torch.compiler.allow_in_graph
def _scale(x: Tensor) -> None:
    x.mul_(3.0)


class WritesInAFunction(WritesItsInput):
    """That Dynamo was told to leave as it is."""

    def write(self, x: Tensor) -> None:
        _scale(x)


class WritesTheBase(WritesItsInput):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = Step.rotate(self, x.view_as(x), cos, sin)
        self.write(x)
        return out


class AnglesChange(Step):
    """In place, after the rotation."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = super().rotate(x, cos, sin)
        if x.shape[1] == KV_HEADS:
            cos.squeeze(1).zero_()
        return out


class Weighed(Step):
    """The second term counts twice."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.add(x * cos, self.turned(x) * sin, alpha=2)


class ByName(Step):
    """Operands that have names."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.add(x * cos, other=self.turned(x) * sin)


class FactorByName(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.mul(x, other=cos) + self.turned(x) * sin


class PartsByName(Step):
    def turned(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat(tensors=(-x2, x1), dim=-1)


class NegativeByName(Step):
    def turned(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((torch.neg(input=x2), x1), dim=-1)


class AnglesByName(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.unsqueeze(input=a.squeeze(1), dim=1) for a in (cos, sin))
        return super().rotate(x, cos, sin)


class Subtracted(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos) - (self.turned(x) * sin)


class Promoted(Step):
    """By angles of another dtype, which the result has."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().rotate(x.bfloat16(), cos, sin)


class NotAtAll(Step):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x


OTHERS = [
    Partly, OtherWay, Uneven, TwoFrequencies, HalvesScaled, QueryAlone, Written,
    WrittenThroughAView, WritesItsInput, WritesByAnOperator, WritesPastAutograd, Renormalizes,
    RenormalizesByPlace, WritesByAnOp, WritesInAFunction, WritesTheBase, AnglesChange, Weighed,
    ByName, FactorByName, PartsByName, NegativeByName, AnglesByName, Subtracted, Promoted, NotAtAll,
]  # fmt: skip


@pytest.mark.parametrize("step", OTHERS)
def test_another_rotation_stays_where_it_is(step: type[Step]) -> None:
    traced = left(step(), inputs(2, 3))
    (node,) = appends(traced)
    assert node.args[3] is None and node.args[4] is None


def test_one_position_for_all_sequences_stays_where_it_is() -> None:
    args = inputs(2, 1)
    args[3] = args[3][:1]
    (node,) = appends(left(Step(), args))
    assert node.args[3] is None


def test_rows_by_name_stay_where_they_are() -> None:
    class Named(Step):
        def rows(self, x: Tensor) -> Tensor:
            return torch.reshape(input=x.transpose(1, 2), shape=(-1, x.shape[1], DIM))

    (node,) = appends(left(Named(), inputs(1, 2)))
    assert node.args[3] is None


@pytest.mark.filterwarnings("error")
def test_one_tensor_may_be_query_and_key() -> None:
    step = Step()

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        return step(k, k, *rest)

    (node,) = appends(left(call, inputs(1, 2)))
    assert node.args[3] is not None


def test_what_others_read_is_kept() -> None:
    class Shown(Step):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            self.seen = super().rotate(x, cos, sin)
            return self.seen

    step = Shown()

    def call(*args: Tensor) -> Tensor:
        out = step(*args)
        return torch.cat((out.flatten(), step.seen.flatten()))

    (node,) = appends(left(call, inputs(1, 2)))
    assert node.args[3] is not None


# ---- models ----


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that are compiled, after `fold_rotary`."""
    graphs: list[GraphModule] = []

    def fold(traced: GraphModule) -> None:
        fold_rotary(traced)
        graphs.append(traced)

    monkeypatch.setattr(compiled, "fold_rotary", fold)
    return graphs


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "gemma3"])
def test_models_are_folded(case: str, kept: list[GraphModule]) -> None:
    model = tiny(case, quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    cache = hf.QuantizedStaticCache(model.config, 64, "float32")
    truth = generate(model, "left", past_key_values=cache)
    cache.reset()
    hf.compile_decode(model, "eager")
    assert torch.equal(generate(model, "left", past_key_values=cache), truth)
    assert kept
    for traced in kept:
        assert len(appends(traced)) == model.config.num_hidden_layers
        assert all(node.args[3] is not None for node in appends(traced))
        assert "neg" not in targets(traced)
        # one table for all layers of the same angles
        tables = {node.args[3] for node in appends(traced)}
        assert len(tables) == (2 if case == "gemma3" else 1)


def test_a_graph_for_every_size_of_a_batch_folds_too(kept: list[GraphModule]) -> None:
    model = tiny("llama", quantized=True)
    model.set_attn_implementation(hf.ATTENTION)
    ids = torch.randint(1, 160, (3, 9), generator=torch.Generator().manual_seed(1))

    def answer(count: int) -> Tensor:
        cache = hf.QuantizedStaticCache(model.config, 64, "float32")
        how = {"do_sample": False, "max_new_tokens": 8, "past_key_values": cache}
        return model.generate(ids[:count], **how)  # type: ignore[no-any-return]

    truth = [answer(count) for count in (1, 3, 2)]
    hf.compile_decode(model, "eager")
    for count, said in zip((1, 3, 2), truth, strict=True):
        assert torch.equal(answer(count), said)
    assert len(kept) == 2  # the second one serves the third size too
    for traced in kept:
        assert [node.args[3] is not None for node in appends(traced)] == [True, True]


def test_logits_of_16_bits_differ_by_rounding() -> None:
    model = tiny("llama", quantized=True).bfloat16()
    model.set_attn_implementation(hf.ATTENTION)
    cache = hf.QuantizedStaticCache(model.config, 64, "bfloat16")

    def second() -> Tensor:
        """The logits of the first step after the prompt."""
        cache.reset()
        how = {"output_logits": True, "return_dict_in_generate": True}
        said: Any = generate(model, "left", 2, past_key_values=cache, **how)
        return said.logits[1].float()

    truth = second()
    hf.compile_decode(model, "eager")
    found = second()
    assert not torch.equal(found, truth)
    # 2 layers of activations with 8 bits, of which a rounding may change the last one
    assert torch.nn.functional.cosine_similarity(found, truth).min() > 0.999
