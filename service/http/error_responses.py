"""Errors as responses, in the shape of the protocol that the client speaks."""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from rednet.service import errors
from rednet.service.http.routes.context import context
from rednet.service.observability import log
from rednet.service.parsing.validation_errors import worded
from rednet.service.statuses import STATUS

MAX_SHOWN_CHARS = 100  # of a path


def add_error_handlers(app: FastAPI) -> None:
    """Answer all errors, the framework's included, in one shape."""
    app.add_exception_handler(errors.ServiceError, service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def error_response(scope: Scope, error: errors.ServiceError) -> Response:
    """The response to a request that ends with this error."""
    log.note(error=error.code)
    headers = {}
    if isinstance(error, errors.Refused):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="rednet"'
    if isinstance(error, errors.Draining):
        headers["Connection"] = "close"  # so that the next request finds another server
    if isinstance(error, errors.RequestTimeout):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return _json(_error_content(scope, error.code, error.message), STATUS[type(error)], headers)


def _json(content: dict[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _error_content(scope: Scope, code: str, message: str) -> dict[str, Any]:
    """An error in the shape of the protocol that its caller speaks."""
    if scope["path"].startswith("/v2"):
        return {"error": message, "code": code}
    return {"error": {"code": code, "message": message}}


async def service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    server = context(request)
    short = server.image_requests.has_short_deadline(dict(request.scope["headers"]))
    if isinstance(error, errors.Refused):
        server.pipeline.metrics.refused(error.reason if short else error.code)
    if isinstance(error, errors.DeadlineExceeded) and short:
        server.pipeline.metrics.short_deadline_exceeded()
    return error_response(request.scope, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    """A parameter that FastAPI could not read."""
    assert isinstance(error, RequestValidationError)
    return error_response(request.scope, errors.MalformedRequest(worded(error.errors()[0])))


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path or method: the framework's own statuses, in the shape of our errors."""
    assert isinstance(error, HTTPException)
    kinds: dict[int, type[errors.ServiceError]] = {404: errors.NotFound, 405: errors.MethodNotAllowed}
    code = kinds.get(error.status_code, errors.MalformedRequest).code
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    path = repr(request.scope["path"][:MAX_SHOWN_CHARS])
    messages = {
        404: f"there is no {path} here",
        405: f"{request.scope['method']} is not supported for {path}; use {headers.get('Allow')}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _json(_error_content(request.scope, code, message), error.status_code, headers)
