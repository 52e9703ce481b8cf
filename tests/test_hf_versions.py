"""Versions of hosts: known ones pass, others are one clear error."""

from __future__ import annotations

import pytest

from qkernels.hf import versions
from qkernels.hf.versions import KNOWN, HostVersionError, require


def test_the_installed_ones_are_known() -> None:
    require("transformers")
    require("peft")


@pytest.mark.parametrize("host", KNOWN)
def test_the_ends_of_the_range(host: str) -> None:
    at_least, below = KNOWN[host]
    for known in (at_least, f"{at_least}.1", f"{at_least}.dev0", f"{at_least}.0+cpu"):
        require(host, known)
    with pytest.raises(
        HostVersionError, match=f"{host} {below}.0 is too new, .*below {below}.*pip"
    ):
        require(host, f"{below}.0")
    with pytest.raises(
        HostVersionError, match=f"{host} 0.1 is too old, .*{at_least} or later.*pip"
    ):
        require(host, "0.1")


def test_no_version_and_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostVersionError, match="has the version 'main', which is none"):
        require("peft", "main")
    monkeypatch.setitem(versions.KNOWN, "no-such-host", ("1", "2"))
    with pytest.raises(HostVersionError, match='not installed: pip install "no-such-host>=1,<2"'):
        require("no-such-host")
