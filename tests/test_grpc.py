"""gRPC on real servers, with tritonclient and with gRPC's own clients for health and reflection."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import encoded, photo
from tests.grpc_helpers import (
    INFER,
    SERVICE,
    Stub,
    assert_failed,
    channel,
    failed,
    floats,
    grpc,
    health,
    image_request,
    never_sent,
    pb,
    pixels_request,
    stub,
)
from tests.http_helpers import sample
from tests.servers import REDNET, FakeRunner, ServerProcess, ServerThread, wait_until
from tests.test_v2 import image_input, normalised

import tritonclient.grpc as triton  # isort: skip  # pytest skips this file above where gRPC is missing

PHOTOS = [encoded(photo(seed)) for seed in range(3)]
KEY = "one-key-0123456789"


@pytest.fixture(scope="module")
def server(tiny_path: Path) -> Iterator[ServerProcess]:
    """A real `rednet serve` with the tiny checkpoint, which also listens for gRPC."""
    with ServerProcess("--checkpoint", tiny_path, "--grpc-port", 0) as running:
        yield running


def test_triton_client_reads_health_and_metadata(server: ServerProcess) -> None:
    """The same as over HTTP, except for HTTP's own extension."""
    client = triton.InferenceServerClient(server.grpc_address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    metadata = client.get_server_metadata(as_json=True)
    assert metadata["name"] == "rednet-serve"
    assert metadata["extensions"] == ["classification", "parameters"]
    model = client.get_model_metadata("tiny", as_json=True)
    expected = server.client.get("/v2/models/tiny").json()
    for tensor in (*model["inputs"], *model["outputs"]):
        tensor["shape"] = [int(each) for each in tensor["shape"]]  # JSON of protobuf has int64 as strings
    assert model == expected
    with stub(server.grpc_address) as calls:
        for name, version in (("large", ""), ("tiny", "2"), ("", "")):
            asked = {"name": name, "version": version}
            assert_failed("NOT_FOUND", "NOT_FOUND", calls.ModelReady, pb.ModelReadyRequest(**asked))
            assert_failed("NOT_FOUND", "NOT_FOUND", calls.ModelMetadata, pb.ModelMetadataRequest(**asked))
            request = image_request(PHOTOS[0], model=name, model_version=version)
            assert_failed("NOT_FOUND", "NOT_FOUND", calls.ModelInfer, request)


@pytest.mark.parametrize("raw", [True, False])
def test_infer_results_equal_those_over_http(server: ServerProcess, raw: bool) -> None:
    """For three photos, as files and as normalised pixels, in raw and in typed contents; all outputs."""
    import tritonclient.http

    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        expected = client.infer("tiny", [image_input(PHOTOS)])
    photos = image_request(*PHOTOS, raw=raw, model="tiny", id="order 66")
    pixels = pixels_request(normalised(0, 1, 2), raw=raw, model="tiny")
    with stub(server.grpc_address) as calls:
        for request in (photos, pixels):
            response = calls.ModelInfer(request)
            assert bool(response.raw_output_contents) is raw
            assert (response.model_name, response.model_version, response.id) == ("tiny", "1", request.id)
            found = floats(response)
            assert list(found) == ["logits", "probabilities", "features"]
            for name, values in found.items():
                np.testing.assert_allclose(values, expected.as_numpy(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("raw", [True, False])
def test_outputs_by_name_and_as_classes(server: ServerProcess, raw: bool) -> None:
    """In the requested order; a classification is text, as over HTTP."""
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("features", "probabilities")]
    outputs[1].parameters["classification"].int64_param = 2
    with stub(server.grpc_address) as calls:
        response = calls.ModelInfer(image_request(*PHOTOS[:2], raw=raw, model="tiny", outputs=outputs))
    described = [(each.name, each.datatype, list(each.shape)) for each in response.outputs]
    assert described == [("features", "FP32", [2, 512]), ("probabilities", "BYTES", [2, 2])]
    result = triton.InferResult(response)
    if raw:
        texts = result.as_numpy("probabilities").ravel().tolist()
    else:
        texts = list(response.outputs[1].contents.bytes_contents)
    scores = server.client.post("/v1/predict?top_k=2", content=PHOTOS[0], headers={"Content-Type": "image/png"}).json()
    for text, score in zip(texts, scores["predictions"][0]["classes"], strict=False):
        value, index, label = text.decode().split(":")
        assert (int(index), label) == (score["index"], score["label"])
        assert float(value) == pytest.approx(score["probability"], abs=1e-4)


def test_triton_client_infers_with_binary_images(server: ServerProcess) -> None:
    """With its own tensors, which have raw contents."""
    client = triton.InferenceServerClient(server.grpc_address)
    tensor = triton.InferInput("image", [3], "BYTES")
    tensor.set_data_from_numpy(np.array(PHOTOS, dtype=np.object_))
    result = client.infer("tiny", [tensor], outputs=[triton.InferRequestedOutput("logits")], client_timeout=30)
    assert result.as_numpy("logits").shape == (3, 5)


def test_metadata_has_request_id_and_timing(server: ServerProcess) -> None:
    """The id that the caller gave is in the trailers, and in the log with what the call took."""
    with stub(server.grpc_address) as calls:
        response, call = calls.ModelInfer.with_call(
            image_request(PHOTOS[0], model="tiny"), metadata=[("x-request-id", "from-the-test")]
        )
        _, other = calls.ServerLive.with_call(pb.ServerLiveRequest(), metadata=[("x-request-id", "not valid")])
    assert response.outputs
    trailers = dict(call.trailing_metadata())
    assert trailers["x-request-id"] == "from-the-test"
    assert trailers["server-timing"].startswith("decode;dur=")
    assert len(dict(other.trailing_metadata())["x-request-id"]) == 32
    wait_until(lambda: "request_id=from-the-test" in server.log, "the line in the log")
    (line,) = (line for line in server.log.splitlines() if "request_id=from-the-test" in line)
    for part in ("images=1", "decode_ms=", f"endpoint={INFER}", "status=200", "grpc_status=OK", "duration_ms="):
        assert part in line


def test_metrics_count_calls_by_method(server: ServerProcess) -> None:
    """With the status that the same outcome has over HTTP. Unknown methods share one label."""
    labels = {"endpoint": INFER, "status": "200"}
    images = {"endpoint": INFER, "outcome": "ok"}
    before = sample(server.client, "rednet_request_duration_seconds_count", **labels)
    images_before = sample(server.client, "rednet_images_total", **images)
    with channel(server.grpc_address) as opened, stub(server.grpc_address) as calls:
        calls.ModelInfer(image_request(*PHOTOS, model="tiny"))
        assert_failed("UNIMPLEMENTED", "NOT_FOUND", opened.unary_unary("/any.Service/Method"), b"")
    assert sample(server.client, "rednet_request_duration_seconds_count", **labels) == before + 1
    assert sample(server.client, "rednet_images_total", **images) == images_before + 3
    unmatched = {"endpoint": "unmatched", "status": "404"}
    assert sample(server.client, "rednet_request_duration_seconds_count", **unmatched) == 1
    assert sample(server.client, "rednet_inflight_requests") == 1  # the scrape


def test_health_protocol_reports_the_server_and_the_service(server: ServerProcess) -> None:
    """Kubernetes' gRPC probes ask it."""
    with channel(server.grpc_address) as opened:
        assert health(opened) == "SERVING"
        assert health(opened, SERVICE) == "SERVING"
        assert_failed("NOT_FOUND", "NOT_FOUND", health, opened, "other.Service")
        check = opened.unary_unary("/grpc.health.v1.Health/Check")
        assert_failed("INVALID_ARGUMENT", "MALFORMED_REQUEST", check, b"\xff")
        watch = opened.unary_stream("/grpc.health.v1.Health/Watch")
        assert failed(next, watch(b"\xff")).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_health_watch_follows_the_state() -> None:
    """Of a server that warms up, serves, drains and ends. A service that is not there is unknown."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    runner = FakeRunner()
    runner.warm.clear()
    kind = health_pb2.HealthCheckResponse
    with ServerThread(runner, grpc_port=0) as running, channel(running.grpc_address) as opened:
        watch = health_pb2_grpc.HealthStub(opened).Watch
        other = watch(health_pb2.HealthCheckRequest(service="other.Service"))
        statuses = watch(health_pb2.HealthCheckRequest())
        assert next(other).status == kind.SERVICE_UNKNOWN
        assert next(statuses).status == kind.NOT_SERVING
        runner.warm.set()
        assert next(statuses).status == kind.SERVING
        running.terminate()
        assert next(statuses).status == kind.NOT_SERVING
        assert list(statuses) == []  # it ends without an error, for which the server need not wait
        running.wait_for_end()
        assert running.exit_code == 0


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
def test_reflection_gives_schemas_with_which_a_client_can_call(server: ServerProcess, version: str) -> None:
    """A client that has no stubs. Both versions of the protocol have the same messages."""
    from google.protobuf import descriptor_pb2, message_factory
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

    asked = [ServerReflectionRequest(list_services=""), ServerReflectionRequest(file_containing_symbol=SERVICE)]
    with channel(server.grpc_address) as opened:
        reflect = opened.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            ServerReflectionRequest.SerializeToString,
            ServerReflectionResponse.FromString,
        )
        listed, described = reflect(iter(asked))
        names = [service.name for service in listed.list_services_response.service]
        assert names == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", SERVICE]
        pool = DescriptorPool()
        for serialized in described.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(serialized))
        method = pool.FindServiceByName(SERVICE).methods_by_name["ModelReady"]
        ask, answer = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
        call = opened.unary_unary(f"/{SERVICE}/ModelReady", ask.SerializeToString, answer.FromString)
        assert call(ask(name="tiny")).ready


def test_grpc_reflection_client_reads_the_health_service(server: ServerProcess) -> None:
    """The reflection client of grpcio, which finds files by name and by symbol."""
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with channel(server.grpc_address) as opened:
        database = ProtoReflectionDescriptorDatabase(opened)
        assert SERVICE in database.get_services()
        pool = DescriptorPool(database)
        assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Check"]
        assert (
            pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name["raw_input_contents"].number == 7
        )
        database._channel = None  # its __del__ would use the closed channel


def test_reflection_is_off_without_documentation() -> None:
    """It is gRPC's form of /docs."""
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    with ServerThread(FakeRunner(), grpc_port=0, docs="off") as running, channel(running.grpc_address) as opened:
        assert_failed("UNIMPLEMENTED", "NOT_FOUND", next, opened.stream_stream(path)(iter([b""])))


def test_malformed_reflection_request_gets_an_error_response(server: ServerProcess) -> None:
    """And no trace in the log."""
    from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionResponse

    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with channel(server.grpc_address) as opened:
        (answer,) = opened.stream_stream(path, None, ServerReflectionResponse.FromString)(iter([b"\xff"]))
    assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "Traceback" not in server.log


def test_calls_need_a_key_where_keys_are_set(tmp_path: Path) -> None:
    """Except for probes. The key is checked before the message has arrived."""
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    request = image_request(PHOTOS[0])
    with ServerThread(FakeRunner(), grpc_port=0, api_key_file=keys) as running, channel(running.grpc_address) as opened:
        calls = Stub(opened)
        wait_until(lambda: calls.ServerReady(pb.ServerReadyRequest()).ready, "readiness")
        assert calls.ServerLive(pb.ServerLiveRequest()).live
        assert health(opened) == "SERVING"
        for shown in (
            [],
            [("authorization", f"Bearer {KEY}0")],
            [("authorization", KEY)],
            [("authorization-bin", b"")],
        ):
            refused = "UNAUTHENTICATED", "UNAUTHORIZED"
            assert_failed(*refused, calls.ModelInfer, request, metadata=shown)
            assert_failed(*refused, calls.ServerMetadata, pb.ServerMetadataRequest(), metadata=shown)
        for scheme in ("Bearer", "bearer"):
            assert calls.ModelInfer(request, metadata=[("authorization", f"{scheme} {KEY}")]).outputs
        assert_failed("UNAUTHENTICATED", "UNAUTHORIZED", opened.stream_unary(INFER), never_sent())


def test_missing_extra_is_reported_at_once() -> None:
    """The message names what to install."""
    script = "import sys; sys.modules['grpc'] = None; from rednet.service.cli.parser import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "serve", "--grpc-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--grpc-port needs grpc: pip install 'rednet-serve[grpc]'" in done.stderr


def test_grpc_is_not_imported_without_its_option() -> None:
    """Neither by the server nor by the command line."""
    script = (
        "import sys, rednet.service.main, rednet.service.cli.commands;"
        "print([name for name in sys.modules if name.split('.')[0] in ('grpc', 'google')])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


def test_port_in_use_is_reported_at_once(server: ServerProcess) -> None:
    """As for HTTP, before anything slow is done."""
    port = server.grpc_address.rpartition(":")[2]
    command = [str(REDNET), "serve", "--port", "0", "--grpc-port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: another process is listening there" in done.stderr


def test_grpc_listens_on_every_address_of_host(tiny_path: Path, tmp_path: Path) -> None:
    """On TCP, even where HTTP is on a Unix socket."""
    path = tmp_path / "socket"
    options = ["--uds", path, "--host", "127.0.0.1,127.0.0.2", "--grpc-port", 0, "--checkpoint", tiny_path]
    process = subprocess.Popen([REDNET, "serve", *map(str, options)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            if "running gRPC on" in line:
                break
        addresses = line.partition("running gRPC on ")[2].partition(" [")[0].split(", ")
        assert len(addresses) == 2
        for address in addresses:
            with stub(address) as calls:
                assert calls.ServerLive(pb.ServerLiveRequest()).live
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server") as client:
            assert client.get("/livez").status_code == 200
    finally:
        process.kill()
        process.communicate()
