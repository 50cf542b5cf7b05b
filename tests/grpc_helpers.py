"""How tests call a server over gRPC, with tritonclient's stubs, and what they look for in its answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.servers import PATIENCE_S

grpc = pytest.importorskip("grpc", reason="needs the extra [grpc]")
pytest.importorskip("grpc_status", reason="needs grpcio-status, by which clients read details of errors")

from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo  # noqa: E402
from grpc_status import rpc_status  # noqa: E402
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402

pb: Any = service_pb2
Stub: Any = service_pb2_grpc.GRPCInferenceServiceStub
SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"
Tensor = pb.ModelInferRequest.InferInputTensor


@contextmanager
def channel(address: str) -> Iterator[Any]:
    """A connection of its own, without a limit on the size of messages."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, [*unlimited, ("grpc.use_local_subchannel_pool", 1)]) as opened:
        yield opened


@contextmanager
def stub(address: str) -> Iterator[Any]:
    with channel(address) as opened:
        yield Stub(opened)


def image_request(*photos: bytes, raw: bool = True, model: str = "fake", **fields: Any) -> Any:
    tensor = Tensor(name="image", datatype="BYTES", shape=[len(photos)])
    request = pb.ModelInferRequest(model_name=model, inputs=[tensor], **fields)
    if raw:
        request.raw_input_contents.append(b"".join(len(each).to_bytes(4, "little") + each for each in photos))
    else:
        request.inputs[0].contents.bytes_contents.extend(photos)
    return request


def pixels_request(pixels: NDArray[np.float32], raw: bool = True, model: str = "fake", **fields: Any) -> Any:
    tensor = Tensor(name="pixels", datatype="FP32", shape=pixels.shape)
    request = pb.ModelInferRequest(model_name=model, inputs=[tensor], **fields)
    if raw:
        request.raw_input_contents.append(pixels.tobytes())
    else:
        request.inputs[0].contents.fp32_contents.extend(pixels.ravel().tolist())
    return request


def floats(response: Any) -> dict[str, NDArray[np.float32]]:
    """The FP32 outputs by name, from raw contents or from typed ones."""
    found = {}
    for index, output in enumerate(response.outputs):
        assert output.datatype == "FP32"
        raw = response.raw_output_contents
        values = np.frombuffer(raw[index], "<f4") if raw else np.array(output.contents.fp32_contents, np.float32)
        found[output.name] = values.reshape(tuple(output.shape))
    return found


def never_sent() -> Iterator[bytes]:
    """The messages of a client that sends none while its call lasts."""
    threading.Event().wait(PATIENCE_S)
    yield b""


def failed(call: Callable[..., object], *arguments: object, **options: object) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return caught.value


def reason(error: Any) -> str:
    """The reason in the details of an error; empty if it has none, as it does not come from a handler of the server."""
    status = rpc_status.from_call(error)
    if status is None:
        return ""
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "rednet-serve"
    return str(info.reason)


def retry_delays_s(error: Any) -> set[float]:
    """When to try again, as `retry-after`, `grpc-retry-pushback-ms` and RetryInfo say."""
    info = RetryInfo()
    assert rpc_status.from_call(error).details[1].Unpack(info)
    trailers = dict(error.trailing_metadata())
    delay_ms = info.retry_delay.ToMilliseconds()
    assert int(trailers["grpc-retry-pushback-ms"]) == delay_ms
    return {float(trailers["retry-after"]), delay_ms / 1000}


def assert_failed(code: str, expected: str, call: Callable[..., object], *arguments: object, **options: object) -> Any:
    """The error that a call ends with. It must have a gRPC status code, a reason and a request id."""
    error = failed(call, *arguments, **options)
    assert (error.code().name, reason(error)) == (code, expected), error
    assert dict(error.trailing_metadata())["x-request-id"]
    return error


def health(opened: Any, service: str = "") -> str:
    """The status that gRPC's health protocol gives."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(opened).Check(request, timeout=PATIENCE_S)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
