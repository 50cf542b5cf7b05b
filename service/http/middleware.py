"""ASGI middleware around every request."""

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence

import structlog
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rednet.service.errors import Draining, Internal, MalformedRequest
from rednet.service.http.error_responses import error_response
from rednet.service.http.request_trace import begin_trace, end_trace
from rednet.service.observability import log, tracing
from rednet.service.observability.metrics import Metrics

logger = logging.getLogger(__name__)
requests = structlog.get_logger()

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # fit for a header, and for a line of the log
WITH_TRAILING_SLASH = ("/v1/", "/v2/", "/livez/", "/readyz/")  # not /metrics/: proxies may hide /metrics only
PROBES = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"}  # requested every few seconds
MAX_LOGGED_CHARS = 200  # of a client's address or user agent
CLIENT_CLOSED_REQUEST = 499  # nginx's status, for metrics and the log: the client is gone


def _as_routed(scope: Scope) -> Scope:
    """The request as it is routed.

    HEAD is routed as GET; uvicorn, which has the original scope, omits the body. A trailing slash in the path of an API
    endpoint is ignored: a redirect would make clients send the photo twice, and would need the public address.
    """
    path: str = scope["path"]
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    if path.endswith("/") and path.startswith(WITH_TRAILING_SLASH):
        scope = {**scope, "path": path[:-1]}
    return scope


class _Exchange:
    """One request and its response: adds the common headers, and counts the bytes of both bodies."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._request_id = request_id.encode()
        self._started = time.monotonic()
        self.status = self.bytes_in = self.bytes_out = 0

    @property
    def duration_s(self) -> float:
        return time.monotonic() - self._started

    async def receive(self) -> Message:
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"] = list(message["headers"])
            headers.append((b"x-request-id", self._request_id))
            headers.append((b"server-timing", b"total;dur=%.1f" % (1000 * self.duration_s)))
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
        await self._send(message)


class RequestContextMiddleware:
    """ASGI middleware: assigns the request id, records metrics and traces, writes the access log, turns unhandled
    exceptions into 500s."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else log.new_id()
        routed = _as_routed(scope)
        log.begin_request(request_id)
        trace = begin_trace(scope, probe=routed["path"] in PROBES) if tracing.is_on() else None
        exchange = _Exchange(request_id, receive, send)
        self._metrics.request_started()
        try:
            await self._app(routed, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the drain is over, and uvicorn cancels what is left: most likely an upload
            if not exchange.status:
                await error_response(scope, Draining())(scope, receive, exchange.send)
        except Exception:
            logger.exception("unhandled exception")
            if not exchange.status:
                await error_response(scope, Internal())(scope, receive, exchange.send)
        finally:
            endpoint = getattr(routed.get("route"), "path", "unmatched")
            self._metrics.request_done(endpoint, exchange.status, duration_s := exchange.duration_s)
            method = scope["method"]
            bytes_out = 0 if method == "HEAD" else exchange.bytes_out  # uvicorn omits the body
            log.note(
                method=method,
                endpoint=endpoint,
                status=exchange.status,
                duration_ms=round(1000 * duration_s, 2),
                bytes_in=exchange.bytes_in,
                bytes_out=bytes_out,
                **_client(scope, headers),
            )
            if trace:
                end_trace(trace, scope, headers, log.noted())
            requests.log(logging.DEBUG if endpoint in PROBES else logging.INFO, "request", logger=__name__)


def _client(scope: Scope, headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """Who sent a request, for the access log."""
    said = {}
    if client := scope.get("client"):  # on a Unix socket there is none
        said["client"] = _loggable(client[0])
    if user_agent := headers.get(b"user-agent"):
        said["user_agent"] = _loggable(user_agent.decode("latin-1"))
    return said


def _loggable(text: str) -> str:
    """A value from a client, shortened, with escapes for what is not printable ASCII."""
    text = text[:MAX_LOGGED_CHARS]
    return text if text.isascii() and text.isprintable() else text.encode("unicode_escape").decode()


class AllowedHostsMiddleware:
    """ASGI middleware: refuses requests to other host names, which protects browsers from DNS rebinding.

    The check is Starlette's; the errors are ours. Probes and scrapes are let through, because kubelet and Prometheus
    name the address of a pod, which is not known in advance.

    Args:
        app: the application.
        hosts: allowed values of the Host header, without a port; a name may start with `*.`.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._check = TrustedHostMiddleware(_accept, hosts, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: list[Message] = []

        async def note(message: Message) -> None:
            refusal.append(message)

        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._check(scope, receive, note)
        if refusal:
            host = dict(scope["headers"]).get(b"host", b"")[:MAX_LOGGED_CHARS].decode("latin-1")
            error = MalformedRequest(f"the server does not answer to the Host header {host!r}; see --allowed-hosts")
            await error_response(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    """The application behind the check of the Host header, which sends nothing."""
