"""A collector for traces: receives OTLP over HTTP, as an OpenTelemetry Collector does, and keeps the spans."""

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.servers import wait_until

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra [otel]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, ERROR = 2, 2  # a span's kind, and its status


def traceparent(trace_id: str = TRACE_ID, sampled: bool = True) -> str:
    """The header by which a caller passes on its trace."""
    return f"00-{trace_id}-{PARENT_ID}-{'01' if sampled else '00'}"


def attributes(of: Any) -> Mapping[str, str | int]:
    """The attributes of a span or a resource."""
    return {each.key: each.value.string_value or each.value.int_value for each in of.attributes}


class Collector:
    """A collector on a free port.

    Attributes:
        spans: all that have arrived.
        services: the names of the services that they are from.
    """

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str | int] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for found in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services.add(attributes(found.resource)["service.name"])
                    collector.spans += [span for scope in found.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def variables(self) -> dict[str, str]:
        """What makes a server export its spans to this collector, and soon."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def trace(self, trace_id: str = TRACE_ID) -> list[Any]:
        """The spans of a trace, by the time of their start. Waits for the span of its request, which comes last."""
        wait_until(lambda: any(span.kind == SERVER for span in self._of(trace_id)), "the span of the request")
        return sorted(self._of(trace_id), key=lambda span: int(span.start_time_unix_nano))

    def _of(self, trace_id: str) -> list[Any]:
        return [span for span in list(self.spans) if span.trace_id.hex() == trace_id]
