"""The parts of `transformers serve` that the server here is put together from.

They are not public: all of them are named here, and held against what is expected of them, so that
a transformers that has moved them is one clear error.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from ..versions import HostVersionError, require

_MODULES = {
    "chat_completion": ("ChatCompletionHandler",),
    "completion": ("CompletionHandler",),
    "model_manager": ("ModelManager",),
    "response": ("ResponseHandler",),
    "server": ("build_server",),
    "systemone": ("SystemOneHandler",),
    "transcription": ("TranscriptionHandler",),
    "utils": ("CBGenerateManager", "GenerateManager", "GenerationState"),
}
# Methods that are called or replaced, and the arguments that they are called with by name.
_METHODS = {
    "ModelManager._load_model": ("model_id_and_revision", "gguf_file"),
    "ModelManager._load_processor": ("model_id_and_revision", "gguf_file"),
    "ModelManager.load_model_and_processor": ("model_id_and_revision", "gguf_file"),
    "ModelManager.get_gen_models": (),
    "ModelManager.process_model_name": ("model_id",),
    "ModelManager.__init__": ("device", "force_model", "continuous_batching"),
    "GenerationState.__init__": ("continuous_batching", "cb_config"),
    "GenerationState.use_continuous_batching": ("model", "modality"),
    "CBGenerateManager.__init__": ("cb_config",),
    "CBGenerateManager.init_cb": ("model", "gen_config"),
    "CBGenerateManager.generate_non_streaming": ("request_id",),
    "GenerationState.get_manager": ("model_id", "use_cb"),
    "GenerateManager.submit": ("fn",),
    "GenerateManager.generate_streaming": ("model", "processor", "inputs", "gen_config"),
    "GenerateManager.generate_non_streaming": ("model", "processor", "inputs", "gen_config"),
    **{
        f"{handler}.{method}": arguments
        for handler in ("ChatCompletionHandler", "CompletionHandler")
        for method, arguments in {
            "_validate_request": ("body",),
            "_resolve_model": ("body",),
            "_build_generation_config": ("body", "model_generation_config", "use_cb"),
            "_streaming": ("model", "inputs", "gen_config"),
            "_non_streaming": ("model", "inputs", "gen_config"),
        }.items()
    },
    "build_server": (
        "model_manager", "chat_handler", "completion_handler", "response_handler",
        "transcription_handler", "systemone_handler", "generation_state",
    ),
}  # fmt: skip


def parts() -> dict[str, Any]:
    """The classes and functions, by name. Raises HostVersionError where transformers does not have
    them as expected, ImportError where what its server needs is not installed."""
    require("transformers")
    try:
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise ImportError("the server needs packages: pip install 'qkernels[serve]'")
        found = {
            name: getattr(import_module(f"transformers.cli.serving.{module}"), name)
            for module, names in _MODULES.items()
            for name in names
        }
    except (ModuleNotFoundError, AttributeError) as error:
        raise _moved(str(error)) from error
    missing = list(_missing(found))
    if missing:
        raise _moved(", ".join(missing))
    return found


def _missing(found: dict[str, Any]) -> list[str]:
    problems = []
    for path, arguments in _METHODS.items():
        name, _, method = path.partition(".")
        function = getattr(found[name], method, None) if method else found[name]
        if function is None:
            problems.append(f"no {path}")
            continue
        has = inspect.signature(function).parameters
        problems += [f"{path} has no argument {a}" for a in arguments if a not in has]
    return problems


def _moved(what: str) -> HostVersionError:
    import transformers

    return HostVersionError(
        f"transformers {transformers.__version__} has another server than the one known here "
        f"(5.19 to 5.23): {what}"
    )
