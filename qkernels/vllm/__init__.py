"""Our linear kernels inside vLLM: `pip install` of this package beside vLLM is all it takes.

vLLM calls `register` in each of its processes (entry point group "vllm.general_plugins"). It puts
kernels for GPTQ, AWQ and compressed-tensors weights first in vLLM's tables, and adds the
quantization method "qkernels" for checkpoints that vLLM's own methods refuse. docs/vllm.md tells
what is served. Importing this module does not import vLLM.
"""

from __future__ import annotations

import logging
import os

from ..hf.versions import require

VARIABLE = "QKERNELS_VLLM"
METHOD = "qkernels"

__all__ = ["register"]

_registered = False


def register() -> None:
    """Makes vLLM in this process use our kernels; a second call does nothing.

    The environment variable QKERNELS_VLLM: "0" leaves vLLM as it is, "1" makes anything that keeps
    the plugin from working an error, "auto" (the default) a warning, with vLLM as it was. Raises
    ValueError for another value of it; with "1", HostVersionError (an ImportError) for a version of
    vLLM that is not known, and AttributeError for one that lacks a hook.
    """
    global _registered
    chosen = os.environ.get(VARIABLE, "") or "auto"
    if chosen not in ("0", "1", "auto"):
        raise ValueError(f'{VARIABLE} must be "0", "1" or "auto", got {chosen!r}')
    if chosen == "0" or _registered:
        return
    try:
        require("vllm")
        from . import hooks

        hooks.install()
    except Exception as error:
        if chosen == "1":
            raise
        logging.getLogger(f"vllm.{METHOD}").warning(
            "qkernels: vLLM runs without our kernels: %s: %s (%s=0 turns this warning off, %s=1 "
            "makes it an error)", type(error).__name__, error, VARIABLE, VARIABLE,
        )  # fmt: skip
        return
    _registered = True
