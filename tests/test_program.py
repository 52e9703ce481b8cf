"""Lowering, and the native executor against the composed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qkernels import backends, ops
from qkernels.cache import PagedKVCache, rope_table
from qkernels.nn import executor
from qkernels.nn.executor import ComposedExecutor, NativeExecutor, column_orders
from qkernels.nn.program import (
    Attention,
    Embed,
    Gate,
    KvAppend,
    Linear,
    Norm,
    Permute,
    Quantize,
    Select,
    Step,
    lower,
)
from qkernels.quant import IQ4_NL, PackedWeight, PlainWeight, QuantSpec, quantize

HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB = 96, 3, 1, 32, 160, 130


def block(layer: int, first: bool, qk_norm: bool, bias: bool) -> list[Step]:
    name = f"{layer}."
    shape = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    steps: list[Step] = [
        Norm("a", "h" if first else "r", name + "norm", add=None if first else "h")
    ]
    for r in "qkv":
        steps.append(Linear(r, "a", name + r, name + "bias_" + r if bias else None))
    if qk_norm:
        steps += [
            Norm("q", "q", name + "q_norm", heads=HEADS),
            Norm("k", "k", name + "k_norm", heads=KV_HEADS),
        ]
    return [
        *steps,
        KvAppend("rotated", "q", "k", "v", layer, **shape, rope="rope.local" if layer else "rope"),
        Attention(
            "o", "rotated", layer, **shape, scale=DIM**-0.5, window=7 if layer else 0, softcap=5.0
        ),
        Linear("r", "o", name + "o"),
        Norm("a", "r", name + "ffn_norm", add="h"),
        Linear("g", "a", name + "gate"),
        Linear("u", "a", name + "up"),
        Gate("m", "g", "u", "silu"),
        Linear("r", "m", name + "down"),
    ]


# Weights of one input with the same number have the same order of columns.
ORDERS = {"q": 0, "k": 0, "v": 1, "o": 2, "gate": 3, "up": 3, "down": 4}


def act_order(plain: PlainWeight, seed: int) -> PlainWeight:
    """The codes and scales of a weight, its columns spread over the groups at random."""
    order = torch.randperm(plain.k, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.empty(plain.k, dtype=torch.int32)
    g_idx[order] = (torch.arange(plain.k) // plain.spec.group(plain.k)).int()
    return replace(plain, spec=replace(plain.spec, act_order=True), g_idx=g_idx)


def model(specs: tuple[QuantSpec, QuantSpec], qk_norm: bool = True, bias: bool = True):
    torch.manual_seed(1)

    def packed(n: int, k: int, spec: QuantSpec, order: int | None = None) -> PackedWeight:
        plain = quantize(torch.randn(n, k) / k**0.5, replace(spec, act_order=False))
        return (act_order(plain, order) if spec.act_order and order is not None else plain).pack()

    steps: list[Step] = [Embed("h", "embed", multiplier=1.5)]
    weights: dict[str, PackedWeight | torch.Tensor] = {"embed": packed(VOCAB, HIDDEN, specs[1])}
    weights["rope"] = rope_table(DIM, 512, theta=1e4)
    weights["rope.local"] = rope_table(DIM // 2, 512, theta=1e2)
    for i in range(2):
        steps += block(i, i == 0, qk_norm, bias)
        shapes = {
            "q": (HEADS * DIM, HIDDEN),
            "k": (DIM, HIDDEN),
            "v": (DIM, HIDDEN),
            "o": (HIDDEN, HEADS * DIM),
        }
        shapes |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
        for j, (r, (n, k)) in enumerate(shapes.items()):
            weights[f"{i}.{r}"] = packed(n, k, specs[j % 2], ORDERS[r])
            weights[f"{i}.bias_{r}"] = torch.randn(n)
        for r, n in {"norm": HIDDEN, "ffn_norm": HIDDEN, "q_norm": DIM, "k_norm": DIM}.items():
            weights[f"{i}.{r}"] = 1 + 0.1 * torch.randn(n)
    weights["final"] = 1 + 0.1 * torch.randn(HIDDEN)
    steps += [Norm("f", "r", "final", add="h"), Select("s", "f"), Linear("logits", "s", "embed")]
    return steps, weights


def lowered_for(steps, weights, act: str) -> tuple[Step, ...]:
    return lower(steps, act_group(weights, act), column_orders(weights).get)


def act_group(weights, act: str):
    def group(name: str) -> int:
        weight = weights[name]
        return 32 if act == "int8" and isinstance(weight, PackedWeight) else 0

    return group


SPECS = {
    "w4-min": (QuantSpec(4, 32, zero="minimum"), QuantSpec(8, 32)),
    "w4-mixed-groups": (QuantSpec(4, 16, zero="integer"), QuantSpec(4, 32)),
    "two-level": (QuantSpec(4, 32, scale="int8", zero="minimum"), QuantSpec(8, 16, scale="int8")),
    "q5-and-q6": (QuantSpec(5, 32), QuantSpec(6, 16, scale="int8")),
    "table-and-3-bits": (QuantSpec(4, 32, table=IQ4_NL), QuantSpec(3, 16, scale="int8")),
    "act-order": (QuantSpec(4, 32, zero="integer", act_order=True),) * 2,
    "act-order-of-some": (QuantSpec(4, 32, act_order=True), QuantSpec(8, 32)),
}


@pytest.mark.parametrize("kv", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("spec", SPECS)
def test_native_step_is_bitwise_the_composed_ops(
    spec: str, act: str, kv: str, isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The composed ops are to run on the same instruction set.
    usual = backends._device_rows
    monkeypatch.setattr(backends, "_rows", {})
    monkeypatch.setattr(
        backends,
        "_device_rows",
        lambda op: [backends.Row(op, "isa", isa.namespace, "cpu"), *usual(op)],
    )
    backends.set_backend("isa")
    steps, weights = model(SPECS[spec])
    lowered = lowered_for(steps, weights, act)
    executors = [
        ComposedExecutor(lowered, weights),
        NativeExecutor(lowered, weights, namespace=isa.namespace),
    ]
    results: list[list[torch.Tensor]] = []
    for execute in executors:
        torch.manual_seed(2)
        cache = PagedKVCache(2, KV_HEADS, DIM, dtype=kv, page_size=16, max_tokens=512)
        seqs = [cache.add() for _ in range(3)]
        out = []
        for counts in ([5, 1, 19], [1, 1, 1], [1, 17, 1]):  # prefill, decode, mixed
            ids = torch.randint(VOCAB, (sum(counts),))
            batch = cache.reserve(seqs, counts)
            select = torch.tensor(counts).cumsum(0) - 1
            out.append(execute(ids, batch, select, cache))
        results.append(out)
    for composed, native in zip(*results, strict=True):
        assert composed.shape == (3, VOCAB) and composed.isfinite().all()
        assert torch.equal(composed, native)


@pytest.mark.parametrize("spec", ["w4-min", "act-order"])
@pytest.mark.parametrize("act", ["int8", "float"])
def test_native_step_does_not_depend_on_the_thread_count(
    act: str, spec: str, with_threads: Callable[[int], None]
) -> None:
    steps, weights = model(SPECS[spec])
    execute = NativeExecutor(lowered_for(steps, weights, act), weights)
    results = []
    for n in (1, 2, 3):
        with_threads(n)
        cache = PagedKVCache(2, KV_HEADS, DIM, dtype="float16", page_size=16, max_tokens=512)
        seq = cache.add()
        ids = torch.arange(41) % VOCAB
        results.append(execute(ids, cache.reserve([seq], [41]), torch.arange(41), cache))
    assert all(torch.equal(results[0], r) for r in results[1:])


# With a single token the steps that are not shared out are done by every thread for itself, and
# fewer barriers stand between them. Norms of heads, in place, are not: hence with and without.
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("spec", SPECS)
def test_single_tokens_are_bitwise_the_composed_ops_on_any_thread_count(
    spec: str, act: str, qk_norm: bool, with_threads: Callable[[int], None]
) -> None:
    steps, weights = model(SPECS[spec], qk_norm=qk_norm)
    lowered = lowered_for(steps, weights, act)
    native = NativeExecutor(lowered, weights)  # one, so that registers grow with the threads

    def decoded(execute: ComposedExecutor | NativeExecutor) -> torch.Tensor:
        cache = PagedKVCache(2, KV_HEADS, DIM, dtype="float16", page_size=16, max_tokens=512)
        seq = cache.add()
        rows, last = [], torch.tensor([0])
        for i in range(30):  # past 256 keys, where attention is split into chunks
            count = {0: 240, 15: 5}.get(i, 1)  # a longer step between single ones
            ids = (torch.arange(count) * 31 + i * 7) % VOCAB
            rows.append(execute(ids, cache.reserve([seq], [count]), last + count - 1, cache))
        return torch.cat(rows)

    with_threads(1)
    expected = decoded(ComposedExecutor(lowered, weights))
    assert expected.isfinite().all() and expected.std() > 0.1
    for n in (1, 2, 3, 5):
        with_threads(n)
        assert torch.equal(expected, decoded(native)), f"{n} threads"


def test_a_native_step_has_its_weights_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor | None] = []
    monkeypatch.setattr(executor, "use_huge_pages", asked.extend)
    steps, weights = model(SPECS["w4-min"])
    NativeExecutor(lowered_for(steps, weights, "int8"), weights)
    found = {t.data_ptr() for t in asked if t is not None}
    packed = [w for w in weights.values() if isinstance(w, PackedWeight)]
    assert packed and all(w.codes.data_ptr() in found for w in packed)


def test_activations_are_quantized_where_they_are_produced() -> None:
    steps, weights = model(SPECS["w4-min"], qk_norm=False)
    lowered = lower(steps, act_group(weights, "int8"))
    norms = [s for s in lowered if isinstance(s, Norm)]
    assert [n.act_group for n in norms] == [32, 32, 32, 32, 0]  # the last one goes to Select
    assert all(s.act_group == 32 for s in lowered if isinstance(s, (Gate, Linear)))
    # attention's output, once per layer, and the selected rows
    assert [s.src for s in lowered if isinstance(s, Quantize)] == ["o", "o", "s"]


def test_a_register_with_float_and_quantized_readers_is_kept_in_float() -> None:
    steps: list[Step] = [
        Embed("h", "e"),
        Norm("a", "h", "n"),
        Linear("q", "a", "int8"),
        Linear("k", "a", "dense"),
    ]
    lowered = lower(steps, {"int8": 64, "dense": 0}.__getitem__)
    assert [type(s) for s in lowered] == [Embed, Norm, Quantize, Linear, Linear]
    assert [s.src for s in lowered[2:]] == ["a", "a:64", "a"]


def test_a_register_written_again_is_quantized_again() -> None:
    steps: list[Step] = [
        Embed("h", "e"),
        Linear("x", "h", "w"),
        Embed("h", "e"),
        Linear("y", "h", "w"),
    ]
    lowered = lower(steps, lambda _: 32)
    assert [type(s) for s in lowered] == [Embed, Quantize, Linear, Embed, Quantize, Linear]


def test_layers_rotate_by_the_table_they_name() -> None:
    steps, weights = model(SPECS["w4-min"])
    cache = PagedKVCache(2, KV_HEADS, DIM, dtype="float32", page_size=16, max_tokens=64)

    def logits(**tables: torch.Tensor) -> torch.Tensor:
        execute = NativeExecutor(lowered_for(steps, weights, "float"), {**weights, **tables})
        seq = cache.add()
        out = execute(torch.arange(9), cache.reserve([seq], [9]), torch.arange(9), cache)
        cache.free(seq)
        return out

    usual = logits()
    other = rope_table(DIM // 2, 512, theta=1e3)
    assert not torch.equal(logits(**{"rope.local": other}), usual)
    assert not torch.equal(logits(rope=other), usual)
    assert torch.equal(logits(), usual)


@pytest.mark.parametrize("act", ["int8", "float"])
def test_a_sorted_linear_is_the_linear_of_an_act_order_weight(act: str) -> None:
    torch.manual_seed(4)
    plain = quantize(torch.randn(130, HIDDEN), QuantSpec(4, 32, zero="integer"))
    weights: dict[str, PackedWeight | torch.Tensor] = {
        "embed": quantize(torch.randn(VOCAB, HIDDEN), QuantSpec(8, 32)).pack(),
        "head": act_order(plain, 7).pack(),
    }
    steps = lowered_for(
        [Embed("h", "embed"), Select("s", "h"), Linear("logits", "s", "head")], weights, act
    )
    assert [type(s) for s in steps[2:-1]] == [Permute, Quantize][: 2 if act == "int8" else 1]
    ids = torch.tensor([3, 99, 0, 41])
    table, head = weights["embed"], weights["head"]
    assert isinstance(table, PackedWeight) and isinstance(head, PackedWeight)
    expected = ops.linear(ops.embedding(ids, table), head, act=act, act_group=32)
    cache = PagedKVCache(1, 1, 16, dtype="float32", page_size=16, max_tokens=32)
    batch = cache.reserve([cache.add()], [4])
    execute = ComposedExecutor(steps, weights)
    assert torch.equal(execute(ids, batch, torch.arange(4), cache), expected)


def test_activations_are_sorted_once_for_weights_of_one_order() -> None:
    steps, weights = model(SPECS["act-order"], qk_norm=False)
    orders = column_orders(weights)
    assert orders["1.k"] == orders["0.q"] and orders["1.up"] == orders["0.gate"]
    assert orders["0.v"] == "0.v" and "embed" not in orders
    lowered = lowered_for(steps, weights, "int8")
    sorts = [(s.dst, s.src, s.order) for s in lowered if isinstance(s, Permute)]
    one_layer = [("a@0", "a", "0.q"), ("a@1", "a", "0.v"), ("o@0", "o", "0.o")]
    one_layer += [("a@0", "a", "0.gate"), ("m@0", "m", "0.down")]
    assert sorts == one_layer * 2
    assert [s.src for s in lowered if isinstance(s, Linear)][:4] == [
        "a@0:32", "a@0:32", "a@1:32", "o@0:32",
    ]  # fmt: skip
    # nothing but the table's activations is quantized before it is sorted
    assert {s.act_group for s in lowered if isinstance(s, (Norm, Gate))} == {0}


def test_a_program_lowered_for_another_order_is_refused() -> None:
    steps, weights = model(SPECS["act-order"])
    for kind in (ComposedExecutor, NativeExecutor):
        with pytest.raises(ValueError, match=r"0\.q has its columns in act-order"):
            kind(lower(steps, act_group(weights, "int8")), weights)
        with pytest.raises(ValueError, match=r"0\.q does not have the column order of 0\.v"):
            kind(lower(steps, act_group(weights, "int8"), lambda name: "0.v"), weights)


class TestBadInput:
    @pytest.fixture
    def step(self):
        steps, weights = model(SPECS["w4-min"])
        execute = NativeExecutor(lower(steps, act_group(weights, "int8")), weights)
        cache = PagedKVCache(2, KV_HEADS, DIM, dtype="int8", page_size=16, max_tokens=64)
        batch = cache.reserve([cache.add()], [3])
        arguments = {
            "plan": execute._plan,
            "ids": torch.tensor([1, 2, 3]),
            "query_start": batch.query_start,
            "kv_len": batch.kv_len,
            "page_table": batch.page_table,
            "select": torch.tensor([2]),
            "vocab": VOCAB,
            "k_pages": cache.k_pages,
            "v_pages": cache.v_pages,
            "k_scale": cache.k_scale,
            "v_scale": cache.v_scale,
        }

        def call(**change):
            return torch.ops.qkernels.decoder_step(**{**arguments, **change})

        call.execute = execute  # keeps the plan alive
        assert call().shape == (1, VOCAB)
        return call

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"plan": 10**9}, "plan 1000000000 does not exist"),
            (
                {"ids": torch.tensor([1, VOCAB, 3])},
                f"token id {VOCAB} at position 1 is outside the vocabulary",
            ),
            ({"ids": torch.tensor([1, -1, 3])}, "token id -1"),
            ({"ids": torch.tensor([1, 2, 3], dtype=torch.int32)}, "ids must be int64, got int32"),
            ({"select": torch.tensor([3])}, r"select\[0\] = 3 is not a row of the 3 tokens"),
            ({"vocab": 7}, f"vocab must be {VOCAB}, got 7"),
            (
                {"kv_len": torch.tensor([2], dtype=torch.int32)},
                r"kv_len\[0\] must count the 3 new tokens too, got 2",
            ),
            ({"kv_len": torch.tensor([2**30], dtype=torch.int32)}, "pages"),
            (
                {"page_table": torch.tensor([[99]], dtype=torch.int32)},
                r"page_table\[0, 0\] must be a page in .*, got 99",
            ),
            (
                {"query_start": torch.tensor([0, 4], dtype=torch.int32)},
                "query_start must run from 0 to 3, got 0 to 4",
            ),
            (
                {"k_pages": torch.zeros(2, 4, KV_HEADS, 16, DIM)},
                "v_pages must be float32, got uint8",
            ),
            ({"k_scale": None}, "k_scale and v_scale go together"),
            # A tensor on meta takes the call to the fake, whose empty logits must not come back.
            ({"query_start": torch.zeros(2, dtype=torch.int32, device="meta")}, "is on meta"),
            (
                {"k_pages": torch.zeros(1, 4, KV_HEADS, 16, DIM, dtype=torch.uint8)},
                "k_pages must be .layers >= 2",
            ),
        ],
    )
    def test_is_refused_by_name(self, step, change, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            step(**change)

    def test_tensors_of_a_plan_survive_a_change_of_data(self) -> None:
        from qkernels.nn.executor import _Encoder

        encoder = _Encoder({"norm": torch.ones(32)})
        at = encoder._tensor("norm")
        encoder.weights["norm"].data = torch.zeros(32)
        assert torch.equal(encoder.tensors[at], torch.ones(32))

    @pytest.mark.parametrize("act", ["int8", "float"])
    def test_no_rows_selected_give_no_logits(self, act: str) -> None:
        steps, weights = model(SPECS["w4-min"])
        execute = NativeExecutor(lower(steps, act_group(weights, act)), weights)
        cache = PagedKVCache(2, KV_HEADS, DIM, dtype="float32", page_size=16, max_tokens=64)
        batch = cache.reserve([cache.add()], [3])
        none = torch.empty(0, dtype=torch.int64)
        assert execute(torch.tensor([1, 2, 3]), batch, none, cache).shape == (0, VOCAB)

    # Registers 0 .. 3 of width 32 and 4 of width 64; tensors: the table, the head, the norm's
    # weight.
    EMBED, HEAD = (1, 0, 0, 4, 32, 64, 32, 0), (6, 4, 32, 64, 32, -1)
    NORM = (12, -1, -1, 1, 0, 0)  # without residual, bias and heads

    def plan(self, *steps: tuple[int, ...], registers: tuple[int, ...] = ()) -> int:
        torch.manual_seed(3)
        weight = [*quantize(torch.randn(64, 32), QuantSpec(4, 32)).pack().op_args()[:6]]
        return torch.ops.qkernels.decoder_plan(
            [*weight, *weight, torch.ones(32)],
            list(registers) or [32, 0] * 4 + [64, 0],
            [n for step in steps for n in step],
            [1.0, 1e-5],
        )

    def test_a_small_program_is_accepted(self) -> None:
        plan = self.plan(self.EMBED, (2, 1, 0, *self.NORM), (7, 2, 1), (3, 4, 2, *self.HEAD))
        torch.ops.qkernels.decoder_plan_free(plan)

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([EMBED, (3, 4, 0, *HEAD)], "the head must read what select wrote"),
            (
                [EMBED, (2, 1, 0, *NORM), (7, 2, 1), (2, 1, 2, *NORM), (3, 4, 1, *HEAD)],
                "register 1 is written before and after select",
            ),
            ([(1, 0, 2**63 - 2, 4, 32, 64, 32, 0)], "needs six of the 13 given"),
            ([(1, 0, 0, 4, 32, 64, 2**61 + 32, 0)], "at most 2147483647 rows and columns"),
            ([EMBED, (4, 1, 0, 2, 3, 2**63 - 1, 1, 1, 32, -1)], "layer must be from 0"),
            ([EMBED, (4, 1, 0, 2, 3, 0, 2**60 + 1, 1, 32, -1)], "q_heads must be from 1"),
            ([EMBED, (4, 1, 0, 2, 3, 0, 1, 1, 2048, -1)], "head_dim must be from 16 to 512"),
            ([EMBED, (4, 1, 0, 2, 3, 0, 1, 1, 24, -1)], "head_dim must be a multiple of 16"),
            (
                [EMBED, (2, 1, 0, *NORM), (4, 1, 0, 1, 0, 0, 1, 1, 32, -1)],
                "kv_append needs a register of its own",
            ),
            (
                [EMBED, (4, 1, 0, 0, 0, 0, 1, 1, 32, -1), (5, 1, 1, 0, 1, 1, 32, 0, 0, 0)],
                "attention needs a register of its own",
            ),
        ],
    )
    def test_a_program_that_would_leave_its_registers_is_refused(self, steps, message) -> None:
        with pytest.raises(RuntimeError, match=f"qkernels::decoder_plan: .*{message}"):
            self.plan(*steps)

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            (torch.arange(32).int(), "a column order must be int64, got int32"),
            (torch.arange(31), r"a column order must be .*32.*got .*31"),
            (torch.arange(1, 33), "a column order must be from 0 to 31, got 32 at 31"),
            (torch.arange(-1, 31), "a column order must be from 0 to 31, got -1 at 0"),
        ],
    )
    def test_a_column_order_that_would_leave_the_row_is_refused(self, order, message) -> None:
        weight = [*quantize(torch.randn(64, 32), QuantSpec(4, 32)).pack().op_args()[:6]]

        def plan(*order: torch.Tensor, dst: int = 1) -> int:
            code = [*self.EMBED, 9, dst, 0, 6, 7, 2, dst, 3, 4, 2, 0, *self.HEAD[1:]]
            return torch.ops.qkernels.decoder_plan(
                [*weight, *order], [32, 0] * 4 + [64, 0], code, [1.0]
            )

        torch.ops.qkernels.decoder_plan_free(plan(torch.arange(32)))
        with pytest.raises(RuntimeError, match=f"qkernels::decoder_plan: .*{message}"):
            plan(order)
        with pytest.raises(RuntimeError, match="permute needs a register of its own"):
            plan(torch.arange(32), dst=0)

    @pytest.mark.parametrize(("width", "group"), [(2**61, 0), (32, 2**32), (32, 2**32 - 32)])
    def test_a_register_beyond_all_memory_is_refused(self, width: int, group: int) -> None:
        with pytest.raises(RuntimeError, match="register 1 needs a width from 1 to"):
            self.plan(self.EMBED, registers=(32, 0, width, group))

    @pytest.mark.parametrize("spec", ["w4-min", "act-order"])
    @pytest.mark.parametrize("seed", range(4))
    def test_a_damaged_program_is_refused_or_runs_but_never_crashes(
        self, step, seed: int, spec: str
    ) -> None:
        from qkernels.nn.executor import _Encoder

        steps, weights = model(SPECS[spec])
        encoder = _Encoder(weights)
        for s in lowered_for(steps, weights, "int8"):
            encoder.add(s)
        registers = [n for pair in encoder.registers for n in pair]
        generator = torch.Generator().manual_seed(seed)
        refused = 0
        for _ in range(150):
            code = list(encoder.code)
            at = int(torch.randint(len(code), (1,), generator=generator))
            code[at] = int(torch.randint(-2, 200, (1,), generator=generator))
            try:
                plan = torch.ops.qkernels.decoder_plan(
                    encoder.tensors, registers, code, encoder.numbers
                )
            except RuntimeError as error:
                assert str(error).startswith("qkernels::decoder_plan: ")
                refused += 1
                continue
            try:
                step(plan=plan, ids=torch.tensor([1, 2, 3]))
            except RuntimeError as error:
                assert str(error).startswith("qkernels::decoder_step: ")
            torch.ops.qkernels.decoder_plan_free(plan)
        assert refused > 75
