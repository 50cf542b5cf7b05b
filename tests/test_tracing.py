"""Traces of real servers, which a real OTLP receiver gets."""

import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from rednet.service.observability import tracing
from tests.collector import ERROR, PARENT_ID, SERVER, TRACE_ID, Collector, attributes, traceparent
from tests.conftest import encoded, photo
from tests.http_helpers import TEXT, predict
from tests.servers import FakeRunner, ServerProcess, ServerThread, free_port, wait_until

STAGES = ["decode", "queue", "inference", "render"]
OPENMETRICS = {"Accept": "application/openmetrics-text"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two front ends"])
def server(request: pytest.FixtureRequest, tiny_path: object, collector: Collector) -> Iterator[ServerProcess]:
    """A server that exports to the collector."""
    with traced(collector.variables, "--checkpoint", tiny_path, "--frontends", request.param) as running:
        yield running


@pytest.fixture
def trace_id() -> str:
    """Of the caller of one test."""
    return secrets.token_hex(16)


def traced(variables: Mapping[str, str], *options: object) -> ServerProcess:
    """A server with these variables in its environment."""
    return ServerProcess(*options, **variables)  # type: ignore[arg-type]


def log_line(server: ServerProcess, trace_id: str) -> str:
    """The line of the access log with a trace id."""
    wait_until(lambda: trace_id in server.log, "the request's line")
    (found,) = [line for line in server.log.splitlines() if trace_id in line]
    return found


def test_request_has_five_spans_below_the_callers(server: ServerProcess, collector: Collector, trace_id: str) -> None:
    """Their parents are right, each stage lies within the request, and begins after the one before has ended."""
    headers = {"traceparent": traceparent(trace_id), "tracestate": "shop=1,other=2"}
    response = predict(server.client, encoded(photo()), **headers)
    assert response.status_code == 200
    request, *stages = collector.trace(trace_id)
    assert (request.name, request.kind, request.trace_state) == ("POST /v1/predict", SERVER, "shop=1,other=2")
    assert request.parent_span_id.hex() == PARENT_ID
    assert [span.name for span in stages] == STAGES
    assert {span.parent_span_id for span in stages} == {request.span_id}
    times = [request.start_time_unix_nano]
    for span in stages:
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    times.append(request.end_time_unix_nano)
    assert times == sorted(times)
    assert abs(times[-1] / 1e9 - time.time()) < 60
    assert "rednet-serve" in collector.services


def test_attributes_follow_the_conventions(server: ServerProcess, collector: Collector, trace_id: str) -> None:
    """Those of OpenTelemetry for HTTP, and some of this server's own."""
    data = encoded(photo())
    headers = {"traceparent": traceparent(trace_id), "User-Agent": "a test", "X-Request-Id": trace_id[:8]}
    response = server.client.post("/v1/predict?top_k=2", content=data, headers=headers)
    request, _, _, inference, _ = collector.trace(trace_id)
    url = httpx.URL(server.url)
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/predict",
        "http.response.status_code": 200,
        "http.request.body.size": len(data),
        "http.response.body.size": len(response.content),
        "url.scheme": "http",
        "url.path": "/v1/predict",
        "url.query": "top_k=2",
        "server.address": url.host,
        "server.port": url.port,
        "client.address": "127.0.0.1",
        "user_agent.original": "a test",
        "network.protocol.version": "1.1",
        "rednet.request_id": trace_id[:8],
        "rednet.images": 1,
        "rednet.batch_size": 1,
    }
    assert attributes(inference) == {"rednet.batch_size": 1}


@pytest.mark.parametrize("header", [None, "rubbish", f"ff-{TRACE_ID}-{PARENT_ID}-01", f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_request_without_a_valid_caller_begins_a_trace(
    server: ServerProcess, collector: Collector, trace_id: str, header: str | None
) -> None:
    """Its id is in the line of the access log."""
    headers = {"traceparent": header} if header else {}
    predict(server.client, encoded(photo()), **{"X-Request-Id": trace_id}, **headers)
    found = re.search(r"trace_id=(\w{32}) span_id=(\w{16}) trace_flags=0[13]", log_line(server, trace_id))
    assert found
    request, *stages = collector.trace(found[1])
    assert [span.name for span in stages] == STAGES
    assert (request.span_id.hex(), request.parent_span_id) == (found[2], b"")


def test_request_of_a_caller_that_does_not_sample_has_no_spans(
    server: ServerProcess, collector: Collector, trace_id: str
) -> None:
    """The caller's id is in the log all the same. A request after it, on the same connection, is traced again."""
    predict(server.client, encoded(photo()), traceparent=traceparent(trace_id, sampled=False))
    assert "trace_flags=00" in log_line(server, trace_id)
    later = secrets.token_hex(16)
    predict(server.client, encoded(photo()), traceparent=traceparent(later))
    assert len(collector.trace(later)) == 5
    assert not [span for span in collector.spans if span.trace_id.hex() == trace_id]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/readyz/", "/metrics", "/v2/health/live", "/v2/health/ready"])
def test_probes_and_scrapes_have_no_spans(
    server: ServerProcess, collector: Collector, trace_id: str, path: str
) -> None:
    """Other requests have one, whatever they ask for."""
    assert server.client.get(path, headers={"traceparent": traceparent(trace_id)}).status_code == 200
    later = secrets.token_hex(16)
    server.client.get("/v1/model", headers={"traceparent": traceparent(later)})
    (span,) = collector.trace(later)
    assert span.name == "GET /v1/model"
    assert not [span for span in collector.spans if span.trace_id.hex() == trace_id]


def test_pipelined_probe_has_no_part_in_the_trace_before_it(
    server: ServerProcess, collector: Collector, trace_id: str
) -> None:
    """A request that was sent early begins in the context of the one before it."""
    data = encoded(photo())
    post = (
        f"POST /v1/predict HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n"
        f"Traceparent: {traceparent(trace_id)}\r\n\r\n"
    ).encode() + data
    other = secrets.token_hex(16)
    unsampled = post.replace(trace_id.encode(), other.encode()).replace(b"-01\r\n", b"-00\r\n")
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(post + unsampled)
        log_line(server, other)
    assert [span.name for span in collector.trace(trace_id)] == ["POST /v1/predict", *STAGES]


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("/v1/features", STAGES),
        ("/v1/explain.json", STAGES),
        ("/v1/explain", ["decode", "queue", "inference", "draw", "render"]),
    ],
)
def test_other_endpoints_have_the_same_stages(
    server: ServerProcess, collector: Collector, trace_id: str, path: str, stages: list[str]
) -> None:
    """The picture of an explanation is drawn by a decoder."""
    headers = {"traceparent": traceparent(trace_id)}
    assert server.client.post(path, content=encoded(photo()), headers=headers).status_code == 200
    assert [span.name for span in collector.trace(trace_id)] == [f"POST {path}", *stages]


def test_infer_request_with_pixels_has_nothing_to_decode(
    server: ServerProcess, collector: Collector, trace_id: str
) -> None:
    """The route, not the path with the model's name, names the span."""
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    tensor = {"name": "pixels", "datatype": "FP32", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    headers = {"traceparent": traceparent(trace_id)}
    response = server.client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}, headers=headers)
    assert response.status_code == 200, response.text
    request, *stages = collector.trace(trace_id)
    assert request.name == "POST /v2/models/{name}/infer"
    assert attributes(request)["url.path"] == "/v2/models/tiny/infer"
    assert [span.name for span in stages] == STAGES[1:]


def test_client_errors_have_their_code_and_are_no_failure_of_the_server(
    server: ServerProcess, collector: Collector, trace_id: str
) -> None:
    """The status of the span stays unset, as the conventions have it for 4xx."""
    predict(server.client, TEXT, traceparent=traceparent(trace_id))
    (request,) = collector.trace(trace_id)
    said = attributes(request)
    assert (said["http.response.status_code"], said["error.type"]) == (415, "unsupported_media_type")
    assert request.status.code == 0


def test_server_errors_mark_the_span(collector: Collector, trace_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails; decoding has a span, and the stages that were not reached have none."""
    for name, value in collector.variables.items():
        monkeypatch.setenv(name, value)
    runner = FakeRunner()
    runner.fail_on = lambda _: True
    tracing.configure()
    with ServerThread(runner) as running:
        assert predict(running.client, encoded(photo()), traceparent=traceparent(trace_id)).status_code == 500
    assert not tracing.is_on()
    request, *stages = collector.trace(trace_id)
    assert [span.name for span in stages] == ["decode"]
    assert attributes(request)["error.type"] == "internal"
    assert request.status.code == ERROR


def test_request_with_many_images_has_sixteen_spans_per_stage(
    server: ServerProcess, collector: Collector, trace_id: str
) -> None:
    """Otherwise one request would fill the queue of the exporter."""
    files = [("file", (f"{index}.png", encoded(photo(index)))) for index in range(20)]
    headers = {"traceparent": traceparent(trace_id)}
    assert server.client.post("/v1/predict", files=files, headers=headers).status_code == 200
    request, *stages = collector.trace(trace_id)
    assert attributes(request)["rednet.images"] == 20
    names = [span.name for span in stages]
    assert {name: names.count(name) for name in STAGES} == {"decode": 16, "queue": 16, "inference": 16, "render": 1}


def test_latency_histograms_have_exemplars(server: ServerProcess, trace_id: str) -> None:
    """In the OpenMetrics format, which is valid; the usual format has none. A scrape of any front end answers for all,
    but each has the exemplars of its own requests."""
    exemplars = {}

    def has_exemplar() -> bool:
        predict(server.client, encoded(photo()), traceparent=traceparent(trace_id))
        response = server.client.get("/metrics", headers=OPENMETRICS)
        assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        for family in text_string_to_metric_families(response.text):  # type: ignore[no-untyped-call]
            for sample in family.samples:
                if sample.exemplar and sample.exemplar.labels["trace_id"] == trace_id:
                    exemplars[sample.labels.get("stage") or sample.labels["endpoint"]] = sample
        return len(exemplars) == 3

    wait_until(has_exemplar, "exemplars")
    assert exemplars.keys() == {"/v1/predict", "decode", "respond"}
    for sample in exemplars.values():
        assert sample.exemplar.value <= float(sample.labels["le"])
    usual = server.client.get("/metrics")
    assert usual.headers["content-type"].startswith("text/plain")
    assert trace_id not in usual.text


@pytest.mark.parametrize("front_ends", [1, 2])
def test_last_spans_are_exported_before_the_end(tiny_path: object, front_ends: int, trace_id: str) -> None:
    """Although the exporter would have waited a minute."""
    with Collector() as collector:
        variables = collector.variables | {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_SERVICE_NAME": "shop"}
        with traced(variables, "--checkpoint", tiny_path, "--frontends", front_ends) as server:
            predict(server.client, encoded(photo()), traceparent=traceparent(trace_id))
            assert not collector.spans
            assert server.terminate() == 0
        assert len(collector.trace(trace_id)) == 5
        assert collector.services == {"shop"}


@pytest.mark.parametrize("kind", ["refuses", "hangs"])
@pytest.mark.parametrize("front_ends", [1, 2])
def test_collector_that_is_down_harms_nothing(tiny_path: object, kind: str, front_ends: int) -> None:
    """Requests are answered, the log has a few lines about it, and SIGTERM takes a second longer at most."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if kind == "hangs" else free_port()
        endpoint = f"http://127.0.0.1:{port}"
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20"}
        with traced(variables, "--checkpoint", tiny_path, "--frontends", front_ends) as server:
            for _ in range(100):
                assert predict(server.client, encoded(photo())).status_code == 200
            started = time.monotonic()
            assert server.terminate() == 0
            assert time.monotonic() - started < 6
            lines = [line for line in server.log.splitlines() if "[opentelemetry" in line]
            assert len(lines) <= 4 * front_ends
            assert "could not be exported" in server.log


def test_sampler_of_the_environment_decides_without_a_caller(tiny_path: object, collector: Collector) -> None:
    """A caller decides for its own requests."""
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}
    variables = collector.variables | sampler
    with traced(variables, "--checkpoint", tiny_path) as server:
        count, trace_id = len(collector.spans), secrets.token_hex(16)
        predict(server.client, encoded(photo()))
        predict(server.client, encoded(photo()), traceparent=traceparent(trace_id))
        assert len(collector.trace(trace_id)) == 5
        assert len(collector.spans) == count + 5


def test_grpc_calls_are_traced(tiny_path: object, collector: Collector, trace_id: str) -> None:
    """The context of the caller is in the metadata; health checks have no spans."""
    from tests.grpc_helpers import image_request, pb, stub

    options = ("--checkpoint", tiny_path, "--grpc-port", 0)
    with traced(collector.variables, *options) as server, stub(server.grpc_address) as client:
        probe = secrets.token_hex(16)
        assert client.ServerReady(pb.ServerReadyRequest(), metadata=[("traceparent", traceparent(probe))]).ready
        request = image_request(encoded(photo()), model="tiny")
        client.ModelInfer(request, metadata=[("traceparent", traceparent(trace_id))])
        call, *stages = collector.trace(trace_id)
        assert call.name == "inference.GRPCInferenceService/ModelInfer"
        assert (call.kind, call.parent_span_id.hex()) == (SERVER, PARENT_ID)
        assert [span.name for span in stages] == STAGES
        said = attributes(call)
        assert (said["rpc.system.name"], said["rpc.method"]) == ("grpc", call.name)
        assert (said["rpc.response.status_code"], said["rednet.images"]) == ("OK", 1)
        assert not [span for span in collector.spans if span.trace_id.hex() == probe]
