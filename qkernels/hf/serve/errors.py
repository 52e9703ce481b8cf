"""Errors as OpenAI's API spells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException


class RequestError(HTTPException):
    """A request that cannot be answered. param: the field that is wrong; code: for programs."""

    def __init__(self, status: int, message: str, param: str | None, code: str | None) -> None:
        super().__init__(status_code=status, detail=message)
        self.param, self.code = param, code


def wrong(status: int, message: str, param: str | None, code: str | None = None) -> RequestError:
    return RequestError(status, message, param, code)


def refuse(param: str, why: str) -> RequestError:
    """Of an option of OpenAI's that this server does not have."""
    return RequestError(400, f"{param} is not supported: {why}", param, "unsupported_parameter")


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_json(message: str, kind: str) -> str:
    return json.dumps(error_body(message, kind))


def kind_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    return "invalid_request_error" if status < 500 else "server_error"


def server_error(app: Any) -> None:
    """Makes all errors of a FastAPI application such JSON."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException as StarletteHTTPException

    @app.exception_handler(StarletteHTTPException)
    async def of_http(_: Any, error: StarletteHTTPException) -> JSONResponse:
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        body = error_body(str(error.detail), kind_of(error.status_code), param, code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Any, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(str(one.get("msg", one)) for one in error.errors())
        body = error_body(
            f"expected a JSON object, as application/json: {said}", "invalid_request_error"
        )
        return JSONResponse(body, status_code=400)

    @app.exception_handler(Exception)
    async def of_anything(_: Any, error: Exception) -> JSONResponse:
        said = f"{type(error).__name__}: {error}"
        return JSONResponse(error_body(said, "server_error"), status_code=500)
