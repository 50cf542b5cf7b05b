"""RequestContextMiddleware around small ASGI applications, without a server."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rednet.service.http.middleware import RequestContextMiddleware
from rednet.service.observability.metrics import Metrics


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(f"{scope['method']} {scope['path']}")(scope, receive, send)


def exchange(
    app: ASGIApp, method: str = "GET", path: str = "/x", headers: Sequence[tuple[bytes, bytes]] = ()
) -> tuple[list[Message], Metrics]:
    """The messages that the middleware sends for a request, and the metrics afterwards."""
    metrics, sent = Metrics(), list[Message]()
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b""}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(RequestContextMiddleware(app, metrics)(scope, receive, send))
    assert metrics.registry.get_sample_value("rednet_inflight_requests") == 0
    return sent, metrics


def requests_counted(metrics: Metrics, status: int) -> float | None:
    labels = {"endpoint": "unmatched", "status": str(status)}
    return metrics.registry.get_sample_value("rednet_request_duration_seconds_count", labels)


@pytest.mark.parametrize(("given", "echoed"), [(b"abc-1", True), (b"with blank", False), (b"x" * 129, False)])
def test_middleware_echoes_a_valid_request_id_and_replaces_others(given: bytes, echoed: bool) -> None:
    """An id that is too long or unfit for a log line is replaced."""
    (start, _), metrics = exchange(hello, headers=[(b"x-request-id", given)])
    headers = dict(start["headers"])
    assert (headers[b"x-request-id"] == given) == echoed
    assert headers[b"x-request-id"]
    assert headers[b"server-timing"].startswith(b"total;dur=")
    assert headers[b"cache-control"] == b"no-store"
    assert requests_counted(metrics, 200) == 1


@pytest.mark.parametrize(
    ("method", "path", "routed"),
    [
        ("HEAD", "/x", b"GET /x"),
        ("POST", "/v1/predict/", b"POST /v1/predict"),
        ("GET", "/readyz/", b"GET /readyz"),
        ("GET", "/metrics/", b"GET /metrics/"),
    ],
)
def test_middleware_routes_head_as_get_and_ignores_trailing_slashes(method: str, path: str, routed: bytes) -> None:
    """The path of `/metrics` is not changed, because proxies may hide exactly that path."""
    (_, body), _ = exchange(hello, method, path)
    assert body["body"] == routed


def test_middleware_turns_an_unhandled_exception_into_500(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the traceback, and the response does not contain the message."""

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a secret")

    (start, body), metrics = exchange(fails)
    assert start["status"] == 500
    assert json.loads(body["body"])["error"]["code"] == "internal"
    assert b"secret" not in body["body"]
    assert "a secret" in caplog.text
    assert requests_counted(metrics, 500) == 1


def test_middleware_answers_a_cancelled_request_with_503() -> None:
    """At the end of the drain, uvicorn cancels the requests that are left."""

    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    (start, body), _ = exchange(cancelled)
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "draining"


def test_middleware_counts_a_disconnected_client_as_499() -> None:
    """Nothing is sent, because the client has gone."""

    async def disconnected(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    sent, metrics = exchange(disconnected)
    assert sent == []
    assert requests_counted(metrics, 499) == 1
