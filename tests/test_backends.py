"""The table of rows: who is chosen, what is said when a row is passed over, and that traces
follow."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import FORMATS, random_plain
from test_decoder import make
from torch import Tensor, nn

import qkernels as qk
from qkernels import backends, ops
from qkernels.backends import FallbackError, FallbackWarning, Row
from qkernels.ops.linear import default_act_group
from qkernels.quant import PackedWeight, QuantSpec

CPU = torch.device("cpu")


@pytest.fixture
def four(generator: torch.Generator) -> PackedWeight:
    return random_plain(QuantSpec(4, 32), 64, 64, generator).pack()


WIDE = 32784  # columns of one group: one more unit than the CPU's int8 sums take


@pytest.fixture
def wide(generator: torch.Generator) -> PackedWeight:
    """A scale per row, longer than the CPU kernels sum in int32."""
    return random_plain(QuantSpec(4, -1), 64, WIDE, generator).pack()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test registers are gone after it."""
    monkeypatch.setattr(backends, "_rows", {op: list(rows) for op, rows in backends._rows.items()})
    monkeypatch.setattr(backends, "_choices", {})


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the namespaces that the choice falls on."""
    seen: list[str] = []
    overload = backends._overload

    def record(namespace: str, op: str):
        seen.append(f"{namespace}::{op}")
        return overload(namespace, op)

    monkeypatch.setattr(backends, "_overload", record)
    return seen


def test_kernels_come_first_and_the_reference_when_asked(
    four: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    x = torch.randn(2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with qk.backend("auto"):
            ops.linear(x, four)
        with qk.backend("reference"):
            ops.linear(x, four)
        with qk.backend("cpu"):
            ops.linear(x, four)
    assert seen == ["qkernels::linear", "qkernels_reference::linear", "qkernels::linear"]


def test_a_choice_is_made_once_per_case(
    four: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qk.backend("auto"):
        seen = calls(monkeypatch)
        for _ in range(3):
            ops.linear(torch.randn(2, 64), four)
        assert len(seen) == 1
        ops.linear(torch.randn(2, 64), four, act="float")
        assert len(seen) == 2


def test_a_fallback_is_said_once_with_its_reasons(
    wide: PackedWeight, generator: torch.Generator
) -> None:
    x = torch.randn(2, WIDE)
    with qk.backend("auto", on_fallback="warn"):
        with pytest.warns(
            FallbackWarning,
            match=r"linear of W4 row float16.* on the 'reference' row.*cpu: .*more than 32768 col",
        ):
            y = ops.linear(x, wide)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(ops.linear(x, wide), y)
        other = random_plain(QuantSpec(8, -1), 64, WIDE, generator).pack()
        with pytest.warns(FallbackWarning, match="W8 row"):  # another case
            ops.linear(x, other)


def test_a_fallback_can_be_an_error_or_silent(wide: PackedWeight) -> None:
    x = torch.randn(2, WIDE)
    with qk.backend("auto", on_fallback="error"):
        for _ in range(2):
            with pytest.raises(FallbackError, match="more than 32768 columns could overflow"):
                ops.linear(x, wide)
        ops.linear(x, wide, act="float")  # nothing is passed over
    with qk.backend("auto", on_fallback="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear(x, wide)


def test_what_the_cpu_kernels_refuse(wide: PackedWeight) -> None:
    case = {"weight": wide.kind, "act": "int8", "group": WIDE, "act_group": WIDE}
    choice = backends.choose("linear", "cpu", case)
    assert choice.row.name == "reference" and "could overflow" in choice.reasons[0][1]
    with pytest.raises(RuntimeError, match="at most 32768, got 32784"):  # said by the kernel too
        torch.ops.qkernels.linear(torch.randn(1, WIDE), *wide.op_args(), None, "int8", WIDE)


@pytest.mark.parametrize("spec", [form.spec for form in FORMATS.values()], ids=list(FORMATS))
def test_every_format_has_a_cpu_kernel(spec: QuantSpec, generator: torch.Generator) -> None:
    weight = random_plain(spec, 64, 256, generator).pack()
    for act in ("int8", "float"):
        group = default_act_group(weight) if act == "int8" else 0
        case = {"weight": weight.kind, "act": act, "group": weight.group, "act_group": group}
        assert backends.choose("linear", "cpu", case).row.name == "cpu"


def test_sums_that_could_overflow_are_not_tried() -> None:
    kind = SimpleNamespace(bits=8, table=False, scale="float16", zero="symmetric", group_size=-1)
    for span, reason in ((32768, False), (WIDE, True)):
        case = {"weight": kind, "act": "int8", "group": span, "act_group": span}
        assert (backends._int8_linear(case) is not None) == reason


def test_rows_of_others(table: None, four: PackedWeight) -> None:
    backends.register_row(
        Row("linear", "mine", "qkernels_reference", "cpu", lambda case: None), before="cpu"
    )
    names = ["cuda", "triton", "mine", "cpu", "reference"]
    assert [row.name for row in backends.rows("linear")] == names
    assert backends.choose("linear", "cpu", {"weight": four.kind}).row.name == "mine"
    assert "mine" in backends.names()
    with pytest.raises(ValueError, match="named 'mine' already"):
        backends.register_row(Row("linear", "mine", "elsewhere"))
    with pytest.raises(ValueError, match="no row named 'theirs'"):
        backends.register_row(Row("linear", "ours", "elsewhere"), before="theirs")
    backends.register_row(Row("linear", "late", "nowhere", "cpu", lambda case: "it rains"))
    assert [row.name for row in backends.rows("linear")][2:5] == ["mine", "cpu", "late"]
    backends.register_row(Row("norm", "mine", "qkernels_reference", "cpu"), before="cpu")
    backends.register_row(Row("norm", "late", "nowhere", "cpu"))
    order = [row.name for row in backends.rows("norm")]
    assert order == ["cuda", "triton", "mine", "cpu", "late", "reference"]


@pytest.mark.parametrize("op", ["linear", "linear_quant", "attention", "embedding"])
def test_rows_of_others_run_in_a_decoder(table: None, op: str) -> None:
    model = make(act="float" if op == "linear" else "int8")
    assert model.composed_because() is None
    backends.register_row(Row(op, "mine", "qkernels_reference", "cpu"), before="cpu")
    assert "the row 'mine' computes" in (model.composed_because() or "")


def test_plugins_come_through_their_entry_point(
    table: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def good() -> None:
        backends.register_row(Row("norm", "plugin", "qkernels_reference", "cpu"), before="cpu")

    def broken() -> None:
        raise OSError("no such device")

    entries = [
        SimpleNamespace(value="a:good", load=lambda: good),
        SimpleNamespace(value="b:broken", load=lambda: broken),
    ]
    monkeypatch.setattr(
        backends.metadata,
        "entry_points",
        lambda group: entries if group == "qkernels.backends" else [],
    )
    monkeypatch.setattr(backends, "_plugins_loaded", False)
    with pytest.warns(UserWarning, match="b:broken.*no such device"):
        assert "plugin" in [row.name for row in backends.rows("norm")]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'; there are \['auto'"):
        qk.set_backend("gpu")
    with pytest.raises(ValueError, match="on_fallback"):
        qk.set_backend("auto", on_fallback="shout")
    with qk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' has no row for device cpu"):
        backends.select("norm", CPU)


def test_the_context_puts_back_what_was(four: PackedWeight) -> None:
    qk.set_backend("cpu", on_fallback="ignore")
    with pytest.raises(KeyError), qk.backend("reference", on_fallback="error"):
        assert backends.current() == ("reference", "error")
        raise KeyError
    assert backends.current() == ("cpu", "ignore")


@pytest.mark.parametrize(
    "name, said",
    [
        ("reference", "reference::norm"),
        ("nonsense", "unknown backend 'nonsense' (from QKERNELS_BACKEND)"),
        ("", "qkernels::norm"),
    ],
)
def test_the_environment(name: str, said: str) -> None:
    code = (
        "import torch; from qkernels import backends; "
        "print(backends.select('norm', torch.device('cpu')).name())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QKERNELS_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr


def test_traces_follow_the_backend(four: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(module.code)
        return module

    @torch.compile(fullgraph=True, backend=keep)
    def run(x: Tensor) -> Tensor:
        return ops.linear(x, four, act="float")

    x = torch.randn(2, 64)
    with qk.backend("auto"):
        run(x)
    with qk.backend("reference"):
        run(x)
    assert "ops.qkernels.linear" in graphs[0] and "ops.qkernels_reference.linear" in graphs[1]


def test_a_refused_case_says_so_in_a_trace(wide: PackedWeight) -> None:
    run = torch.compile(lambda x: ops.linear(x, wide), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, WIDE)
    with qk.backend("auto", on_fallback="ignore"):
        assert torch.equal(run(x), ops.linear(x, wide))


def test_info(four: PackedWeight, wide: PackedWeight) -> None:
    build = qk.info()
    assert (
        build.isa in build.isas
        and "scalar" in build.isas
        and build.threads == torch.get_num_threads()
    )
    assert torch.__version__ in str(build) and build.cuda in str(build)
    served = dict(build.ops)
    assert served["linear"][2:] == served["attention"][2:] == ("cpu", "reference")
    assert "set_cpu_isa" not in served and "\nlinear_quant " in str(build)

    class Layer(nn.Module):
        def __init__(self, packed: PackedWeight, act: str = "auto") -> None:
            super().__init__()
            self.packed, self.act = packed, act

    model = nn.Sequential(Layer(four, "float"), Layer(wide, "int8"))
    with qk.backend("auto"):
        said = qk.info(model)
    assert [(layer.name, layer.row, layer.act) for layer in said.layers] == [
        ("0", "cpu", "float"),
        ("1", "reference", "int8"),
    ]
    assert said.nbytes == four.nbytes + wide.nbytes
    assert "could overflow" in str(said) and "W4 g32 float16" in str(said)
    assert qk.info({"w": four}).layers[0].name == "w"
    with pytest.raises(TypeError, match="got int"):
        qk.info(3)
