"""qkernels/bench: what is chosen, how inputs rotate, wrong kernels, timing, ceilings. Nothing here
is a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import MODEL, SMALL, TINY, attention_case, linear_case, norm_case
from torch import Tensor

from qkernels import bench
from qkernels.bench import (
    attention,
    ceilings,
    check,
    inputs,
    linear,
    machine,
    norm,
)
from qkernels.bench.cases import (
    CONTEXTS,
    GROUPS,
    Q4_K,
    ROWS,
    SPECS,
    AttentionCase,
    LinearCase,
    NormCase,
)
from qkernels.bench.inputs import Rotation, TooLarge, random_weight
from qkernels.bench.shapes import MODELS
from qkernels.bench.suite import build, variants
from qkernels.bench.timing import Timer, interleave
from qkernels.cache import KV_DTYPES
from qkernels.quant.spec import BITS, QuantSpec


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


# selection


def test_the_space_holds_what_it_should() -> None:
    cases = list(bench.every_case())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    linears = {
        (c.model, c.spec.bits, c.spec.group_size, c.m) for c in cases if c.kernel == "linear"
    }
    for model in MODELS:
        for bits in BITS:
            for group in GROUPS:
                assert all((model, bits, group, m) in linears for m in ROWS)
    found = {(c.kernel, c.context, c.kv_dtype) for c in cases if isinstance(c, AttentionCase)}
    kernels = ("attention_decode", "attention_prefill")
    assert found == {(k, c, kv) for k in kernels for c in CONTEXTS for kv in KV_DTYPES}
    norms = {(c.kernel, c.quantized) for c in cases if isinstance(c, NormCase)}
    assert norms == {(k, q) for k in ("rms_norm", "layer_norm") for q in (False, True)}


def test_tiers_contain_one_another() -> None:
    quick = {c.name for c in bench.select(tier=bench.QUICK)}
    standard = {c.name for c in bench.select()}
    everything = {c.name for c in bench.select(tier=bench.FULL)}
    assert quick < standard < everything
    assert 10 < len(quick) < 40  # about two seconds each
    assert {c.model for c in bench.select(tier=bench.QUICK)} == {MODEL}


def test_selection_by_model_kernel_and_rows() -> None:
    cases = bench.select(models=["llama-3.2-1b"], kernel=r"^linear .*Q4_K", rows=[1, 512])
    assert {c.model for c in cases} == {"Llama-3.2-1B"}
    assert {c.m for c in cases} == {1, 512}
    assert all(c.kernel == "linear" and "Q4_K" in c.name for c in cases)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"models": ["SmolLM2-135"]}, "unknown model 'SmolLM2-135'.* did you mean SmolLM2-135M"),
        ({"kernel": "("}, r"'\(' is not a regular expression"),
        ({"rows": [3]}, r"no case has M \[3\]; M may be \[1, 2, 4"),
        ({"rows": [1, 3]}, r"no case has M \[3\]"),
        ({"kernel": "nothing"}, r"no case of this selection fits kernel 'nothing', M any, .*8B$"),
        ({"kernel": "down.* W3 g64 zero act float M=2$"}, r"no case .* 4 of a larger tier do"),
    ],
)
def test_selections_that_cannot_be(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.select(**wanted)


# inputs


def test_copies_pass_twice_the_cache_within_the_limit() -> None:
    rotation = Rotation(cache=1000, limit=5000)
    assert rotation.copies(1) == 2000
    assert rotation.copies(300) == 7  # 2100 bytes
    assert rotation.copies(3000) == 1
    assert Rotation(cache=4000, limit=5000).copies(900) == 5
    with pytest.raises(TooLarge, match="takes 0 MB"):
        rotation.copies(5001)


def test_last_level_cache(tmp_path: Path) -> None:
    assert machine.last_level_cache(tmp_path, [0]) == 32 << 20
    for core in range(4):
        for index, size in enumerate(("32K", "512K", "8M", "?")):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "size").write_text(f"{size}\n")
            owners = ("0-1" if core < 2 else "2-3") if size == "8M" else str(core)
            (folder / "shared_cpu_list").write_text(f"{owners}\n")
    assert machine.last_level_cache(tmp_path, [0, 1]) == 8 << 20
    assert machine.last_level_cache(tmp_path, [0, 1, 2]) == 16 << 20  # two caches


def test_every_copy_of_a_weight_is_used_and_lies_elsewhere() -> None:
    problem = build(linear_case(QuantSpec(4, 32)), SMALL)
    assert problem.rotated >= 2 * SMALL.cache
    spec = QuantSpec(4, 32)
    copies = inputs.weight_copies(random_weight(spec, 72, 160), SMALL)
    assert len({copy.codes.data_ptr() for copy in copies}) == len(copies) > 1
    assert len({copy.scale.data_ptr() for copy in copies}) == len(copies)
    seen: list[int] = []
    call = inputs.turns([(i,) for i in range(3)], seen.append)
    for i in range(7):
        call(i)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_baseline_that_does_not_fit_is_left_out_and_says_why() -> None:
    case = linear_case(QuantSpec(4, 32))
    problem = build(case, Rotation(cache=1, limit=20_000))  # ours takes 11 kB, bfloat16 23 kB
    assert set(problem.left_out) == {"torch_bfloat16", "torch_float32", "torch_int4pack"}
    assert "one copy takes" in problem.left_out["torch_bfloat16"]
    assert "N a multiple of 16" in problem.left_out["torch_int4pack"]


def test_bytes_and_operations() -> None:
    problem = build(linear_case(QuantSpec(4, 32, zero="minimum"), m=2), SMALL)
    assert problem.nbytes == 72 * 160 * 5 / 8  # 4 bits, and two float16 per 32
    assert problem.ops == 2 * 2 * 72 * 160
    problem = build(linear_case(Q4_K), SMALL)
    assert problem.nbytes == 72 * 160 * 4.5 / 8  # a file's: 144 bytes per 256 weights
    problem = build(norm_case(True, True), SMALL)
    assert problem.nbytes == 4 * 3 * 100 and problem.ops == 8 * 3 * 100
    problem = build(attention_case("int8", m=4, context=10), SMALL)
    assert problem.nbytes == 10 * 2 * 3 * (64 + 4)
    assert problem.ops == 4 * (7 + 8 + 9 + 10) * 9 * 64


# the check


@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_right_linears_pass(spec: QuantSpec, act: str) -> None:
    build(linear_case(spec, act), SMALL).check()


@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES))
@pytest.mark.parametrize("m", [1, 7, 100])
def test_right_attention_passes(kv_dtype: str, m: int) -> None:
    build(attention_case(kv_dtype, m), SMALL).check()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_right_norms_pass(center: bool, quantized: bool) -> None:
    build(norm_case(center, quantized), SMALL).check()


def slightly_off(value: Any) -> Any:
    """One number of the result moved by a thousandth of the largest."""
    tensor = value if isinstance(value, Tensor) else value[1]
    tensor = tensor.clone()
    tensor.view(-1)[0] += 2e-3 * tensor.abs().max()
    return tensor if isinstance(value, Tensor) else (value[0], tensor, *value[2:])


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kernel)
def test_a_wrong_kernel_is_an_error_and_not_timed(
    case: bench.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (linear, attention, norm):
        real = module.select

        def wrong(op: str, device: Any, real: Any = real, **facts: Any) -> Any:
            right = real(op, device, **facts)
            return lambda *args: slightly_off(right(*args))

        monkeypatch.setattr(module, "select", wrong)
    timed: list[Any] = []
    monkeypatch.setattr(
        "qkernels.bench.suite.interleave", lambda *args, **checks: timed.append(args)
    )
    with pytest.raises(bench.CheckError, match=r"differ from the reference; worst at \[0"):
        bench.measure(case, bench.QUICK_EFFORT, SMALL)
    assert timed == []


@pytest.mark.parametrize("act", ["int8", "float"])
def test_one_column_that_is_missing_is_an_error(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a long row, where rounding is allowed more."""
    case = LinearCase(MODEL, 2, bench.QUICK, "long", 64, 14336, QuantSpec(4, 32), act)
    problem = build(case, Rotation(1, 1 << 27))
    problem.check()
    real = linear.select

    def without_a_column(op: str, device: Any, **facts: Any) -> Any:
        right = real(op, device, **facts)

        def wrong(x: Tensor, *rest: Any) -> Tensor:
            x = x.clone()
            x[:, 5000] = 0.0
            return right(x, *rest)

        return wrong

    monkeypatch.setattr(linear, "select", without_a_column)
    with pytest.raises(bench.CheckError, match="differ from the reference"):
        build(case, Rotation(1, 1 << 27)).check()


def test_one_token_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention_case("int8", context=2048)
    build(case, Rotation(1, 1 << 24)).check()
    real = attention.select

    def without_the_last(op: str, device: Any) -> Any:
        right = real(op, device)
        return lambda q, start, length, *rest: right(q, start, length - 1, *rest)

    monkeypatch.setattr(attention, "select", without_the_last)
    with pytest.raises(bench.CheckError, match="differ from the reference"):
        build(case, Rotation(1, 1 << 24)).check()


LINEARS = [
    LinearCase(MODEL, 3, bench.QUICK, "tiny", 96, 160, QuantSpec(bits, 32), act)
    for bits, act in ((4, "int8"), (8, "int8"), (8, "float"))
]
ATTENTIONS = [
    attention_case(kv_dtype, m) for kv_dtype in ("float16", "float32", "int8") for m in (1, 7, 100)
]
NORMS = [norm_case(center, False) for center in (False, True)]


@pytest.mark.parametrize("case", [*LINEARS, *ATTENTIONS, *NORMS], ids=lambda case: case.name)
def test_right_baselines_pass(case: bench.Case) -> None:
    problem = build(case, SMALL)
    assert not problem.left_out
    for name, baseline in problem.baselines.items():
        baseline.check(name, baseline.call(0))


def refused(case: bench.Case, baseline: str) -> None:
    """Timing must stop with an error that names the case and the baseline."""
    timed: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timer, "sample", lambda self: timed.append(self))
        with pytest.raises(bench.CheckError, match="differ from the reference") as error:
            bench.measure(case, bench.QUICK_EFFORT, SMALL)
    assert str(error.value).startswith(f"{case.name}: {baseline}")
    assert timed == []


@pytest.mark.parametrize("m", [7, 100])
def test_a_baseline_without_its_causal_mask_is_an_error(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention.F.scaled_dot_product_attention

    def unmasked(*args: Any, attn_mask: Any, is_causal: bool, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", unmasked)
    refused(attention_case("int8", m), "torch_sdpa")


@pytest.mark.parametrize("m", [1, 7, 100])
def test_a_baseline_with_mixed_up_heads_is_an_error(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention.F.scaled_dot_product_attention

    def mixed(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return real(q, k, v.roll(1, dims=1), **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", mixed)
    refused(attention_case("int8", m), "torch_sdpa")


@pytest.mark.parametrize(
    "case, baseline, argument, change",
    [
        (LINEARS[0], linear.BFLOAT16, 1, lambda w: w.roll(1, 0)),
        (LINEARS[0], linear.FLOAT32, 0, lambda x: x.bfloat16().float()),
        (LINEARS[0], linear.INT4, 3, lambda scales: scales.flip(2)),
        (LINEARS[0], linear.INT4, 3, lambda scales: scales.roll(1, 1)),
        (LINEARS[2], linear.INT8, 2, lambda scale: scale.roll(1)),
        (LINEARS[1], linear.INT_MM, 0, lambda codes: codes.clamp(-3, 3)),
        (NORMS[0], "torch_rms_norm", 3, lambda eps: 0.1),
        (NORMS[1], "torch_layer_norm", 3, lambda bias: bias * 1.01),
    ],
)
def test_a_baseline_that_computes_something_else_is_an_error(
    case: bench.Case,
    baseline: str,
    argument: int,
    change: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (linear, norm):
        monkeypatch.setattr(module, "turns", changed_turns(case, baseline, argument, change))
    refused(case, baseline)


def changed_turns(
    case: bench.Case, baseline: str, argument: int, change: Callable[[Any], Any]
) -> Callable[[Any, Any], Callable[[int], Any]]:
    """`turns` that changes an argument of the calls of one baseline, known by their order."""
    names = iter(["ours", *variants(case)[1:]])

    def turns(items: Any, call: Any) -> Callable[[int], Any]:
        if next(names) == baseline:
            items = [(*a[:argument], change(a[argument]), *a[argument + 1 :]) for a in items]
        return inputs.turns(items, call)

    return turns


def test_nan_is_wrong() -> None:
    zero = torch.zeros(2)
    with pytest.raises(bench.CheckError, match="1 of 2 values"):
        check.require_close("x", torch.tensor([0.0, torch.nan]), zero, zero + 1)


# timing


def test_rounds_go_back_and_forth_and_copies_go_on() -> None:
    clock = iter(range(1000))
    calls: list[tuple[str, int]] = []
    variants = {name: (lambda i, n=name: calls.append((n, i))) for name in "ab"}
    effort = bench.Effort(rounds=5, seconds=1e-9)  # one call per sample
    samples = interleave(variants, effort, lambda: float(next(clock)))
    assert samples == {"a": [1e6] * 5, "b": [1e6] * 5}
    warm = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert calls[:4] == warm
    assert [name for name, _ in calls[4:]] == list("abbaabbaab")
    assert [i for name, i in calls if name == "a"] == list(range(7))


def test_a_sample_takes_as_many_calls_as_its_time_needs() -> None:
    now = [0.0]

    def call(i: int) -> None:
        now[0] += 0.5

    timer = Timer(call, 2.0, lambda: now[0])
    assert timer.calls == 4
    assert timer.sample() == 0.5e6


def test_a_baseline_that_takes_too_long_is_called_once() -> None:
    now, called = [0.0], {"ours": 0, "near": 0, "far": 0}
    takes = {"ours": 0.5, "near": 1.5, "far": 2.5}  # near: slow, but not four times

    def variant(name: str) -> Callable[[int], None]:
        def call(i: int) -> None:
            called[name] += 1
            now[0] += takes[name]

        return call

    effort = bench.Effort(rounds=5, seconds=0.1)
    samples = interleave({name: variant(name) for name in takes}, effort, lambda: now[0])
    assert samples == {"ours": [0.5e6] * 5, "near": [1.5e6] * 5, "far": [2.5e6]}
    assert called == {"ours": 7, "near": 7, "far": 1}


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 rounds, got 4"):
        bench.Effort(rounds=4)


# ceilings


@pytest.mark.parametrize("kind", ceilings.PEAKS)
def test_peak_counts_operations(isa: Any, kind: str) -> None:
    ones = isa.ops.cpu_peak(kind, 1)
    assert ones > 0 and ones % 2 == 0
    assert isa.ops.cpu_peak(kind, 100) == 100 * ones


def test_peak_of_a_team_is_that_of_all_its_threads(with_threads: Callable[[int], None]) -> None:
    one = torch.ops.qkernels.cpu_peak("int8", 10)
    with_threads(2)
    assert torch.ops.qkernels.cpu_peak("int8", 10) == 2 * one


def test_a_sample_of_a_peak_is_long_and_the_best_try(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], iter([4.0, 2.0, 8.0, 4.0, 5.0, 5.0])
    asked: list[tuple[str, int]] = []

    def peak(kind: str, steps: int) -> int:
        asked.append((kind, steps))
        now[0] += next(seconds)
        return 10**9

    monkeypatch.setattr(torch.ops.qkernels, "cpu_peak", peak)
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ceilings, "best_read", lambda array, repeats: 20.0)
    monkeypatch.setattr(ceilings, "_READ_BYTES", (8, 8))
    top = ceilings.Ceilings()
    top.measure()
    assert top.peak == {"int8": [0.5], "float32": [0.25]} and top.read == [20.0]
    assert {kind for kind, _ in asked} == set(ceilings.PEAKS)
    assert all(steps >= 100_000 for _, steps in asked)  # 12 multiply-adds each


def test_peak_refuses_what_it_does_not_know() -> None:
    with pytest.raises(RuntimeError, match='cpu_peak: kind must be "int8" or "float32", got "x"'):
        torch.ops.qkernels.cpu_peak("x", 1)
    with pytest.raises(RuntimeError, match="cpu_peak: steps must be positive, got 0"):
        torch.ops.qkernels.cpu_peak("int8", 0)
