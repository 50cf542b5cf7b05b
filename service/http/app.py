"""The web application: routes, error responses, and the middleware around every request."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rednet.service import errors
from rednet.service.decoding.decoder import Decoder
from rednet.service.http.api_keys import Keys
from rednet.service.http.routes import docs, explain, health, page, v1, v2
from rednet.service.http.routes.context import Context, context, require_key
from rednet.service.http.statuses import STATUS
from rednet.service.model_description import ModelBody
from rednet.service.observability import log
from rednet.service.observability.metrics import Metrics
from rednet.service.parsing.bodies import BodyLimits
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.parsing.parser import Parser
from rednet.service.pipeline import Journey, callers_id
from rednet.service.settings import Settings
from rednet.service.types import EngineClient

logger = logging.getLogger(__name__)
requests = structlog.get_logger()

LARGEST_BODIES = 16  # of the largest size, that may be held at a time; of photos of an everyday size that is thousands
WITH_FINAL_SLASH = ("/v1/", "/v2/", "/livez/", "/readyz/")  # not /metrics/: proxies may hide /metrics only
PROBES = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"}  # asked every few seconds
CLIENT_LEFT = 499  # for metrics and the log; nobody is there to receive it


def create_app(
    settings: Settings,
    client: EngineClient,
    decoder: Decoder,
    metrics: Metrics,
    model: ModelBody,
    keys: Keys | None = None,
) -> FastAPI:
    """The application around an engine's client, which it closes when it shuts down.

    Args:
        settings: limits on bodies and deadlines.
        client: the engine.
        decoder: for the images of requests.
        metrics: what `/metrics` shows.
        model: what `/v1/model` says.
        keys: of which requests must carry one; None: anyone may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await decoder.start()
        for route in app.routes:  # FastAPI prepares them when it first looks at them, for 20 ms: not during a request
            route.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})
        client.start()  # only now: it measures what batches cost here
        yield
        await client.close()
        decoder.close()
        parser.close()

    app = FastAPI(
        title=docs.TITLE,
        description="A RedNet involution classifier.",
        lifespan=lifespan,
        servers=[{"url": "."}],  # relative to the document: a proxy may add a path prefix
        docs_url=None,  # `routes.docs` has them, with relative links
        redoc_url=None,
        redirect_slashes=False,  # to what this server takes for its own address; the middleware serves such paths
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `/metrics` and the log say it
    )
    parser = Parser(BodyLimits.of(client.max_images, model.preprocess))
    budget = MemoryBudget(LARGEST_BODIES * settings.max_body_bytes)
    journey = Journey(settings, client, decoder, parser, budget, metrics)
    app.state.context = server = Context(journey, client, decoder, metrics, budget, model, keys)
    guard = [Depends(require_key)] if keys else []
    app.include_router(v1.direct, dependencies=guard)
    app.include_router(v1.router, dependencies=guard)
    app.include_router(explain.router, dependencies=guard)
    app.include_router(v2.router, dependencies=guard)
    app.include_router(health.router)
    app.include_router(health.scraped, dependencies=guard if settings.metrics_access == "key" else [])
    app.include_router(docs.router)
    if settings.page == "on":
        app.include_router(page.router)  # open: it holds nothing, and asks with the key that its user types
    app.add_exception_handler(errors.ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Surroundings, metrics=metrics)
    metrics.watch(client, lambda: server.state)
    return app


def _error_response(scope: Scope, error: errors.ServiceError) -> Response:
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


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    server = context(request)
    short = server.journey.has_short_deadline(request)
    if isinstance(error, errors.Refused):
        server.metrics.refused(error.reason if short else error.code)
    if isinstance(error, errors.DeadlineExceeded) and short:
        server.metrics.short_deadline_exceeded()
    return _error_response(request.scope, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    """A parameter that FastAPI could not read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return _error_response(request.scope, errors.MalformedRequest(f"{place}: {first['msg']}"))


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path or method: the framework's own statuses, in the shape of our errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed_request")
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return _json(_error_content(request.scope, code, str(error.detail)), error.status_code, headers)


def _as_routed(scope: Scope) -> Scope:
    """The request as the routes know it.

    HEAD is routed as GET: uvicorn, which has the scope as it came, leaves out the body. A final slash in the path of
    an API endpoint is ignored: a redirect would make clients send the photo again, and need the public address.
    """
    path: str = scope["path"]
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    if path.endswith("/") and path.startswith(WITH_FINAL_SLASH):
        scope = {**scope, "path": path[:-1]}
    return scope


class Surroundings:
    """ASGI middleware: assigns the request id, records metrics, writes the access log, turns unhandled exceptions into
    500s."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = callers_id(dict(scope["headers"]))
        routed = _as_routed(scope)
        request_id = given.decode() if given else log.new_id()
        log.begin_request(request_id)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = list(message["headers"])
                headers.append((b"x-request-id", request_id.encode()))
                headers.append((b"server-timing", b"total;dur=%.1f" % (1000 * (time.monotonic() - started))))
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        self._metrics.request_started()
        try:
            await self._app(routed, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except asyncio.CancelledError:  # uvicorn ends what is left when the drain is over: an upload, most likely
            if not status:
                await _error_response(scope, errors.Draining())(scope, receive, send_with_id)
        except Exception:
            logger.exception("a defect")
            if not status:
                await _error_response(scope, errors.Internal())(scope, receive, send_with_id)
        finally:
            duration_s = time.monotonic() - started
            endpoint = getattr(routed.get("route"), "path", "unmatched")
            self._metrics.request_done(endpoint, status, duration_s)
            log.note(method=scope["method"], endpoint=endpoint, status=status)
            log.note_ms(duration=duration_s)
            requests.log(logging.DEBUG if endpoint in PROBES else logging.INFO, "request", logger=__name__)
