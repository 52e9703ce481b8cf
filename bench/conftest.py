"""Options of bench/bench_kernels.py under pytest: which cases become tests."""

from __future__ import annotations

import pytest

from qkernels import bench
from qkernels.bench.suite import variants


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption(
        "--bench-quick", action="store_true", help="the cases of qkernels bench --quick"
    )
    group.addoption("--bench-all", action="store_true", help="every case there is")
    group.addoption("--bench-model", action="append", default=[], help="shapes of this model")
    group.addoption("--bench-kernel", default=None, help="regular expression over names of cases")
    group.addoption("--bench-m", type=int, action="append", default=[], help="rows of activations")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames or "variant" not in metafunc.fixturenames:
        return
    if not metafunc.config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("needs pytest-benchmark. Type  pip install 'qkernels[bench]'")
    option = metafunc.config.getoption
    tier = bench.FULL if option("--bench-all") else bench.STANDARD
    if option("--bench-quick"):
        tier = bench.QUICK
    try:
        cases = bench.select(
            models=option("--bench-model"),
            kernel=option("--bench-kernel"),
            rows=option("--bench-m"),
            tier=tier,
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    pairs = [(case, variant) for case in cases for variant in variants(case)]
    ids = [f"{case.name} {variant}" for case, variant in pairs]
    metafunc.parametrize(("case", "variant"), pairs, ids=ids)
