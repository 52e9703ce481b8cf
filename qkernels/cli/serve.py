"""`qkernels serve`."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from .errors import BadInput, bad_input
from .loading import LoadOptions
from .output import bar, note, warn

LOCAL = ("localhost", "127.0.0.1", "::1")
GRACE = 2  # seconds that requests have to end after Ctrl-C
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")


@dataclass(frozen=True)
class ServeOptions:
    """host, port: 0 is a free one. name: of the model, for clients. The others as those of
    `hf.serve.model.served_model` and `hf.serve.handlers.application`."""

    load: LoadOptions
    host: str = "localhost"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    attention: str | None = None
    layers: bool = True
    slots: int = 0
    verbose: bool = False


def run(options: ServeOptions) -> None:
    load = options.load
    path = load.path()
    if options.api_key == "":
        raise BadInput("--api-key: expected a text, got an empty one")
    listener = listen(options.host, options.port)  # so is a port that is taken
    os.environ |= dict.fromkeys(OFFLINE, "1")  # nothing is looked up, or told, anywhere else
    with bar(f"loading {path.name}") as progress:
        import torch

        import qkernels._public  # noqa: F401  the libraries, before parts of the package

        if load.threads is not None:
            torch.set_num_threads(load.threads)
        with bad_input(
            ValueError, TypeError, RuntimeError, KeyError, ImportError, NotImplementedError, OSError
        ):
            from qkernels.hf.serve.handlers import application
            from qkernels.hf.serve.model import served_model

            quieten(options.verbose)

            own = options.layers and not options.slots
            served = served_model(
                path,
                spec=load.spec,
                group_size=load.group_size,
                act=load.act,
                kv_dtype=load.kv_dtype,
                context=load.context,
                attention=options.attention,
                replace_layers=own,
                progress=progress,
            )
            name = options.name or path.stem if path.is_file() else options.name or path.name
            app = application(
                name,
                (served.model, served.tokenizer),
                limit=served.limit,
                slots=options.slots,
                api_key=options.api_key,
            )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if options.host not in LOCAL and options.api_key is None:
        warn(f"{host} can be reached from other machines, and there is no --api-key")
    if not getattr(served.tokenizer, "chat_template", None):
        warn("the model has no chat template: /v1/completions only")
    note(f"{name}: {served.runs}, context of {served.limit} tokens")
    note(f"serving on http://{shown}:{port}/v1 (Ctrl-C ends it)")
    serve(app, listener, options.verbose)


def quieten(verbose: bool) -> None:
    """Whether transformers says what it does."""
    from transformers.utils import logging

    (logging.set_verbosity_info if verbose else logging.set_verbosity_error)()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadInput."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"--host {host} --port {port}: {said}") from error


def serve(app: Any, listener: socket.socket, verbose: bool) -> None:
    """Answers until Ctrl-C. Raises KeyboardInterrupt then."""
    import logging

    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # Requests that are cut off after the grace would each be reported with a traceback.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            super().handle_exit(sig, frame)

    level = "info" if verbose else "warning"
    config = uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=GRACE)
    Server(config).run(sockets=[listener])
