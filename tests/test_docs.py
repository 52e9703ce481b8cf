"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qkernels.ops import registry

ROOT = Path(__file__).resolve().parent.parent


def test_the_schemas_of_the_design_are_those_of_the_ops() -> None:
    text = (ROOT / "docs/design.md").read_text()
    block = text.split("```\npack(")[1].split("```")[0]
    documented = {}
    for line in f"pack({block}".strip().splitlines():
        name, rest = re.fullmatch(r"(\w+)(\(.*)", line.split("#")[0].strip()).groups()
        for short, long in (("W", registry.WEIGHT), ("R", registry.RAGGED)):
            rest = re.sub(rf"(?<=[( ]){short}(?=[,)])", long, rest)
        documented[name] = rest
    state = {"set_cpu_isa", "cpu_isa", "cpu_isas"}  # which kernels run: qkernels/_library.py
    assert documented == {
        name: op.schema for name, op in registry._defs.items() if name not in state
    }


def test_the_five_lines_of_the_readme_run(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f'"{model_path.name}"' in code
    monkeypatch.chdir(model_path.parent)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "Paris" in capsys.readouterr().out
    assert len(names["out"].texts) == 2
