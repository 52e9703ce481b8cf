"""Two layers around an ASGI application: requests end with their clients; a key is asked for."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from .errors import error_body


class _Endings:
    """What has to be called when a request ends early, each once; what comes later, at once."""

    def __init__(self) -> None:
        self._all: list[Callable[[], Any]] = []
        self._over = False

    def add(self, end: Callable[[], Any]) -> None:
        if self._over:
            end()
        else:
            self._all.append(end)

    def call(self) -> None:
        self._over = True
        for end in self._all:
            end()


_ENDINGS: ContextVar[_Endings] = ContextVar("endings")


def when_gone(end: Callable[[], Any]) -> None:
    """Has `end`, which raises nothing, called if the current request loses its client before its
    answer is complete, or fails. For what was begun elsewhere: a request can be cancelled between
    any two steps of the host, also before it reads the first piece of its own answer."""
    _ENDINGS.get().add(end)


class CancelWhenGone:
    """Cancels a request when its client has closed the connection.

    Starlette does so for streams; an answer that is computed before its first byte would be
    computed to its end, for nobody. The body of a request is read first, so that what comes after
    it can only be the end of the connection.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body.append(message)
            if not message.get("more_body", False):
                break
        gone = asyncio.Event()

        async def replay() -> Any:
            if body:
                return body.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        ends = _Endings()
        _ENDINGS.set(ends)
        answer = asyncio.create_task(self._app(scope, replay, send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait((answer, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            left = not answer.done()  # the client is gone, or the server ends
            if left or answer.cancelled() or answer.exception() is not None:
                ends.call()
            if left:
                gone.set()
                answer.cancel()
                await asyncio.wait((answer,))
        if not answer.cancelled() and (error := answer.exception()) is not None:
            raise error


class RequireKey:
    """Refuses requests without the key as a bearer token; /health needs none."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                said = error_body("a wrong API key, or none", "authentication_error", None,
                                  "invalid_api_key")  # fmt: skip
                body = json.dumps(said).encode()
                headers = [(b"content-type", b"application/json"),
                           (b"content-length", str(len(body)).encode())]  # fmt: skip
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)
