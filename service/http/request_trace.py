"""Traces of HTTP requests, with the attributes of OpenTelemetry's semantic conventions."""

import re
from collections.abc import Mapping

from starlette.types import Scope

from rednet.service.observability import tracing
from rednet.service.observability.tracing import Trace

METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
HOST = re.compile(r"(?P<address>\[[^]]+\]|[^:]+)(:(?P<port>\d{1,5}))?")
MAX_CHARS = 1_000  # of a path, a query or a host
# What the access log says about a request.
NOTED = {
    "bytes_in": "http.request.body.size",
    "bytes_out": "http.response.body.size",
    "client": "client.address",
    "error": "error.type",
    "status": "http.response.status_code",
    "user_agent": "user_agent.original",
    "request_id": "rednet.request_id",
    "images": "rednet.images",
    "batch_size": "rednet.batch_size",
}


def begin_trace(scope: Scope, probe: bool) -> Trace | None:
    """Begin the trace of a request, while tracing is on. None: the request is not recorded."""

    def values(name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for header, value in scope["headers"] if header == wanted]

    return tracing.begin(values, probe)


def end_trace(trace: Trace, scope: Scope, headers: Mapping[bytes, bytes], noted: Mapping[str, str | float]) -> None:
    """End the trace of a request.

    Args:
        trace: of the request.
        scope: as it came.
        headers: of the request.
        noted: the values of its line in the access log.
    """
    method = scope["method"]
    known = method if method in METHODS else "_OTHER"
    attributes: dict[str, str | float] = {
        "http.request.method": known,
        "url.path": scope["path"][:MAX_CHARS],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        **{name: noted[each] for each, name in NOTED.items() if each in noted},
        **_address(headers.get(b"host", b"").decode("latin-1")[:MAX_CHARS]),
    }
    if query := scope["query_string"]:
        attributes["url.query"] = query.decode("latin-1")[:MAX_CHARS]
    if known != method:
        attributes["http.request.method_original"] = method[:MAX_CHARS]
    name = "HTTP" if known != method else method
    if (route := noted["endpoint"]) != "unmatched":
        attributes["http.route"] = route
        name = f"{name} {route}"
    failed = int(noted["status"]) >= 500
    if failed:
        attributes.setdefault("error.type", str(noted["status"]))
    trace.end(name, attributes, failed)


def _address(host: str) -> dict[str, str | float]:
    """The address by which the client named the server."""
    found = HOST.fullmatch(host)
    if not found:
        return {}
    port = {"server.port": int(found["port"])} if found["port"] else {}
    return {"server.address": found["address"], **port}
