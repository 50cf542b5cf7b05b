"""Servers that do not trace, because nobody asked for it or the extra is not installed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from rednet.service.observability import tracing
from tests.conftest import encoded, photo
from tests.http_helpers import predict
from tests.servers import ServerProcess

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
IMPORTS = """
import sys
from rednet.service import main
from rednet.service.observability import tracing
tracing.configure()
print(tracing.is_on(), [name for name in sys.modules if name.startswith("opentelemetry.sdk")])
"""
WITHOUT_EXTRA = """
import sys
sys.modules["opentelemetry.sdk"] = None
from rednet.service.cli.parser import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, []),
        (ENDPOINT, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9/v1/metrics"}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp_proto_http"]),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, []),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": ""}, ["otlp_proto_http"]),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, []),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "false"}, ["otlp_proto_http"]),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        (
            ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            ["otlp_proto_http"],
        ),
    ],
)
def test_exporters_follow_the_environment(environment: dict[str, str], names: list[str]) -> None:
    """There are none unless variables ask for traces, and OTEL_SDK_DISABLED overrides the others."""
    assert tracing.exporter_names(environment) == names


def test_sdk_is_not_imported_while_tracing_is_off() -> None:
    """FastAPI imports the API, which does nothing without it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout == "False []\n"


def test_caller_is_ignored_while_tracing_is_off(server: ServerProcess) -> None:
    """Neither its context nor ids of the server's own are in the log."""
    assert predict(server.client, encoded(photo()), traceparent=TRACEPARENT).status_code == 200
    assert "trace_id" not in server.log


def test_server_without_the_extra_warns_and_serves(tiny_path: Path) -> None:
    """The variables are often set for many programs at once."""
    with ServerProcess("--checkpoint", tiny_path, script=WITHOUT_EXTRA, **ENDPOINT) as running:  # type: ignore[arg-type]
        assert predict(running.client, encoded(photo()), traceparent=TRACEPARENT).status_code == 200
        assert "requests are not traced, although OTEL_* variables ask for it" in running.log
        assert "install 'rednet-serve[otel]'" in running.log
        assert running.terminate() == 0


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("OTEL_TRACES_EXPORTER", "jaeger", "'jaeger'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/xml", "http/xml"),
    ],
)
def test_variables_that_cannot_be_obeyed_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str, value: str, named: str
) -> None:
    """Nothing is traced then."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra [otel]")
    for name, each in (ENDPOINT | {variable: value}).items():
        monkeypatch.setenv(name, each)
    with caplog.at_level(logging.WARNING):
        tracing.configure()
    try:
        assert not tracing.is_on()
        assert "requests are not traced" in caplog.text
        assert named in caplog.text
    finally:
        tracing.close()
