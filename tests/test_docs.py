"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from qkernels.nn import QuantLinear
from qkernels.ops import registry

ROOT = Path(__file__).resolve().parent.parent


def test_the_schemas_of_the_design_are_those_of_the_ops() -> None:
    text = (ROOT / "docs/design.md").read_text()
    block = text.split("```\npack(")[1].split("```")[0]
    documented = {}
    for line in f"pack({block}".strip().splitlines():
        name, rest = re.fullmatch(r"(\w+)(\(.*)", line.split("#")[0].strip()).groups()
        for short, long in (
            ("W", registry.WEIGHT),
            ("R", registry.RAGGED),
            ("S", registry.SCORE_BIAS),
        ):
            rest = re.sub(rf"(?<=[( ]){short}(?=[,)])", long, rest)
        documented[name] = rest
    state = {
        "set_cpu_isa",
        "cpu_isa",
        "cpu_isas",
        "cpu_peak",
        "peak_read",
    }  # of qkernels/_library.py
    assert documented == {
        name: op.schema for name, op in registry._defs.items() if name not in state
    }


def readme_code(part: str) -> str:
    """The one block of Python in the README that has this in it."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (code,) = (code for block in blocks if part in (code := block.split("```")[0]))
    return code


def test_the_three_lines_of_the_readme_run() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    names: dict[str, object] = {"model": model}
    exec(compile(readme_code("quantize_"), "README.md", "exec"), names)
    assert isinstance(model[0], QuantLinear) and model[2].act == "int8"
    assert names["report"].params_quantized == 2 * 64 * 128


def test_the_five_lines_of_the_readme_run(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = readme_code("QuantDecoder")
    assert f'"{model_path.name}"' in code
    monkeypatch.chdir(model_path.parent)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "Paris" in capsys.readouterr().out
    assert len(names["out"].texts) == 2
