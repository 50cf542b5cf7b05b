"""Messages over gRPC: the compiled schema, what is taken out of serialized messages, and hostile requests."""

import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import encoded, photo
from tests.grpc_helpers import (
    INFER,
    Tensor,
    assert_failed,
    channel,
    failed,
    floats,
    image_request,
    pb,
    pixels_request,
    stub,
)
from tests.http_helpers import CUT, TEXT
from tests.servers import PATIENCE_S, FakeRunner, ServerThread, wait_until

from rednet.service.errors import MalformedRequest, PayloadTooLarge  # isort: skip
from rednet.service.grpc import messages, wire  # isort: skip

PHOTO = encoded(photo())
PROTO = Path(messages.__file__).with_name("inference.proto")
BLACK = np.zeros((1, 3, 32, 32), np.float32)
MALFORMED = "INVALID_ARGUMENT", "MALFORMED_REQUEST"


@pytest.fixture(scope="module")
def running() -> Iterator[ServerThread]:
    with ServerThread(FakeRunner(), grpc_port=0, max_body_mb=4, max_queue=8) as running:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        yield running


@pytest.fixture(scope="module")
def calls(running: ServerThread) -> Iterator[Any]:
    with stub(running.grpc_address) as calls:
        yield calls


def test_compiled_schema_is_current(tmp_path: Path) -> None:
    """`make proto` was run after the last change of the source."""
    pytest.importorskip("grpc_tools", reason="needs the compiler of grpcio-tools")
    compiled = tmp_path / "inference.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={compiled}"]
    subprocess.run([*command, PROTO], check=True)
    assert compiled.read_bytes() == PROTO.with_suffix(".binpb").read_bytes()


def test_schema_agrees_with_the_schema_of_triton() -> None:
    """Every field has the number, the type and the name that it has in tritonclient."""
    ours = messages.POOL.FindFileByName("inference.proto")
    assert len(ours.message_types_by_name) > 10
    for name, message in ours.message_types_by_name.items():
        theirs = pb.DESCRIPTOR.message_types_by_name[name]
        for mine, other in [(message, theirs), *zip_nested(message, theirs)]:
            for field in mine.fields:
                same = other.fields_by_number[field.number]
                assert (field.name, field.type, field.is_repeated) == (same.name, same.type, same.is_repeated)
    methods = {each.name: (each.input_type.name, each.output_type.name) for each in pb_service().methods}
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        assert methods[method.name] == (method.input_type.name, method.output_type.name)


def zip_nested(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    for nested in ours.nested_types:
        yield nested, theirs.nested_types_by_name[nested.name]


def pb_service() -> Any:
    return pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


@given(st.lists(st.binary(max_size=300), max_size=4), st.lists(st.integers(), max_size=9), st.text())
def test_split_and_field_are_inverse(raw: list[bytes], shape: list[int], name: str) -> None:
    """For fields of every wire type around those that are taken out."""
    shape = [each % 2**63 for each in shape]
    request = pb.ModelInferRequest(model_name=name.encode("ascii", "ignore").decode(), raw_input_contents=raw)
    request.parameters["a double"].double_param = 1.5
    request.inputs.add(shape=shape).contents.fp64_contents.append(2.0)
    taken = {7: wire.Taken(4, MalformedRequest("too many"))}
    rest, values = wire.split(memoryview(request.SerializeToString()), taken)
    assert list(map(bytes, values[7])) == raw
    whole = pb.ModelInferRequest.FromString(rest + b"".join(wire.field(7, value) for value in raw))
    assert whole == request


@given(st.binary(max_size=50))
def test_split_rejects_what_protobuf_rejects(data: bytes) -> None:
    """Anything that it accepts is the same message to protobuf, or invalid inside."""
    try:
        rest, values = wire.split(memoryview(data), {7: wire.Taken(99, MalformedRequest("too many"))})
    except MalformedRequest:
        return
    assert len(rest) + sum(map(len, values[7])) <= len(data)


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",  # a field without a value
        b"\x0a\x05abc",  # shorter than its length
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length of 2**64 - 1
        b"\x80" * 11,  # a varint that does not end
        b"\x0d\x00\x00",  # a cut fixed32
        b"\x09\x00\x00",  # a cut fixed64
        b"\x2b\x2c",  # a group, which proto3 does not have
        b"\x0f",  # a wire type that does not exist
    ],
)
def test_invalid_message_is_malformed(calls: Any, running: ServerThread, message: bytes) -> None:
    """By itself, and inside an input."""
    with pytest.raises(MalformedRequest):
        wire.split(memoryview(message), {})
    nested = wire.field(1, b"fake") + wire.field(5, message)
    with channel(running.grpc_address) as opened:
        for each in (message, nested, wire.field(1, b"fake") + wire.field(5, wire.field(5, message))):
            assert_failed(*MALFORMED, opened.unary_unary(INFER), each)
    assert calls.ModelInfer(image_request(PHOTO)).outputs


def test_message_of_many_fields_is_not_parsed() -> None:
    """100,000 inputs would take 10 MB, and 4 MB of empty parameters 200 MB and an eighth of a second."""
    tracemalloc.start()
    try:
        inputs = memoryview(wire.field(5, b"") * 100_000)
        with pytest.raises(PayloadTooLarge):
            wire.split(inputs, {5: wire.Taken(1, PayloadTooLarge("one"))})
        parameters = memoryview(wire.field(4, b"") * 2_000_000)
        with pytest.raises(MalformedRequest, match="more than 1000 fields"):
            wire.split(parameters, {})
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def several_inputs() -> Any:
    return pb.ModelInferRequest(model_name="fake", inputs=[Tensor()] * 100_000)


def both_contents() -> Any:
    request = image_request(PHOTO)
    request.inputs[0].contents.bytes_contents.append(PHOTO)
    return request


def other_contents() -> Any:
    request = pb.ModelInferRequest(
        model_name="fake", inputs=[Tensor(name="pixels", datatype="FP32", shape=[1, 3, 32, 32])]
    )
    request.inputs[0].contents.fp64_contents.extend([0.0] * 3072)
    return request


def with_tensor(request: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        if name == "shape":
            del request.inputs[0].shape[:]
            request.inputs[0].shape.extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


def with_parameters(request: Any, count: int) -> Any:
    for index in range(count):
        request.parameters[str(index)].bool_param = True
    return request


def with_parameter(request: Any, name: str, value: Any) -> Any:
    request.parameters[name].string_param = value
    return request


def shared_memory() -> Any:
    request = image_request(PHOTO)
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    return request


def outputs(*names: str) -> Any:
    tensors = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]
    return image_request(PHOTO, outputs=tensors)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ModelInferRequest(model_name="fake"), "must have exactly 1 item"),
        (several_inputs(), "must have exactly 1 item"),
        (both_contents(), "either contents or raw_input_contents"),
        (pb.ModelInferRequest(model_name="fake", inputs=image_request(PHOTO).inputs), "either contents or raw_input"),
        (image_request(), "holds no image"),
        (image_request(raw=False), "holds no image"),
        (with_tensor(image_request(PHOTO), shape=[2]), r"as many elements as its shape \[2\]"),
        (with_tensor(image_request(PHOTO, PHOTO), shape=[1]), r"as many elements as its shape \[1\]"),
        (with_tensor(image_request(PHOTO, PHOTO, raw=False), shape=[1]), "has 2 elements, but its shape is"),
        (with_tensor(image_request(PHOTO), shape=[1, 1]), r"must be BYTES \[N\]"),
        (with_tensor(image_request(PHOTO), shape=[]), "shape"),
        (with_tensor(image_request(PHOTO), shape=[-1]), "shape"),
        (with_tensor(image_request(PHOTO), shape=[1] * 30_000), "shape"),
        (with_tensor(image_request(PHOTO), datatype="FP32"), r"must be BYTES \[N\]"),
        (with_tensor(image_request(PHOTO), name="photo"), "'image' or 'pixels'"),
        (with_tensor(pixels_request(BLACK), datatype="FP16"), "must be FP32"),
        (with_tensor(pixels_request(BLACK), shape=[1, 3, 32, 31]), "takes 11904 bytes, not 12288"),
        (with_tensor(pixels_request(BLACK, raw=False), shape=[1, 3, 32, 31]), "takes 11904 bytes, not 12288"),
        (with_tensor(pixels_request(BLACK), shape=[1, 2**62, 2**62, 2**62]), "takes"),
        (with_tensor(pixels_request(BLACK), shape=[3, 32, 32]), "must be FP32"),
        (pixels_request(np.zeros((1, 3, 16, 16), np.float32)), "pixels must be"),
        (pixels_request(np.full((1, 3, 32, 32), np.nan, np.float32)), "must be normalised"),
        (other_contents(), "must be packed fp32_contents"),
        (with_tensor(pixels_request(BLACK, raw=False), name="image", datatype="BYTES", shape=[1]), "bytes_contents"),
        (image_request(PHOTO, id="two\nlines"), "id"),
        (with_parameter(image_request(PHOTO), "triton_x", "1"), "reserved"),
        (with_parameter(image_request(PHOTO), "x", "y" * 70_000), "more than 1000 fields and 65536 bytes"),
        (with_parameters(image_request(PHOTO), 1_000), "more than 1000 fields"),
        (shared_memory(), "shared memory is not supported"),
        (outputs("logits", "logits"), "listed twice"),
        (outputs("scores"), "outputs"),
    ],
)
def test_request_that_does_not_fit_is_malformed(calls: Any, request_: Any, message: str) -> None:
    """The message says why."""
    error = assert_failed(*MALFORMED, calls.ModelInfer, request_)
    assert re.search(message, error.details()), error.details()


def test_image_that_cannot_be_read_fails_the_call(calls: Any) -> None:
    """With the codes that it has over HTTP, and its position."""
    for data, code in ((TEXT, "UNSUPPORTED_MEDIA_TYPE"), (CUT, "UNREADABLE_IMAGE"), (b"", "MALFORMED_REQUEST")):
        for raw in (True, False):
            error = assert_failed("INVALID_ARGUMENT", code, calls.ModelInfer, image_request(PHOTO, data, raw=raw))
            assert error.details().startswith("image 1: ")
    too_many = "INVALID_ARGUMENT", "PAYLOAD_TOO_LARGE"
    assert_failed(*too_many, calls.ModelInfer, image_request(*[b""] * 9))
    assert_failed(*too_many, calls.ModelInfer, image_request(*[b""] * 100_000, raw=False))


def test_parameters_without_effect_are_accepted(calls: Any) -> None:
    """As over HTTP: Triton's clients send some."""
    request = with_parameter(with_parameters(image_request(PHOTO), 900), "mine", "1")
    request.parameters["priority"].uint64_param = 2
    request.parameters["sequence_end"].bool_param = True
    request.parameters["timeout"].int64_param = 1
    request.parameters["empty"].SetInParent()
    assert calls.ModelInfer(request).outputs


def test_typed_pixels_equal_raw_ones(running: ServerThread, calls: Any) -> None:
    """Valid encodings that no library writes are refused: values that are not packed, and contents in two parts."""
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    raw, typed = (floats(calls.ModelInfer(pixels_request(pixels, raw=raw))) for raw in (True, False))
    for name, values in raw.items():
        np.testing.assert_array_equal(values, typed[name])
    request = pixels_request(pixels, raw=False)
    twice = request.inputs[0].SerializeToString() + wire.field(5, wire.field(6, pixels.tobytes()))
    request = pixels_request(BLACK, raw=False)
    request.inputs[0].ClearField("contents")
    unpacked = b"".join(bytes([6 << 3 | 5]) + struct.pack("<f", value) for value in BLACK.ravel()[:100])
    unpacked = request.inputs[0].SerializeToString() + wire.field(5, unpacked)
    with channel(running.grpc_address) as opened:
        for tensor, message in ((twice, "must occur only once"), (unpacked, "must be packed")):
            serialized = wire.field(1, b"fake") + wire.field(5, tensor)
            assert message in assert_failed(*MALFORMED, opened.unary_unary(INFER), serialized).details()


def test_message_larger_than_the_limit_is_refused(calls: Any) -> None:
    """By gRPC itself, before it has arrived as a whole."""
    error = failed(calls.ModelInfer, image_request(bytes(4_100_000)))
    assert error.code().name == "RESOURCE_EXHAUSTED"
    assert "larger than max" in error.details()
    error = failed(calls.ModelReady, pb.ModelReadyRequest(name="x" * 100_000))
    assert error.code().name == "INVALID_ARGUMENT"
    assert calls.ModelInfer(image_request(PHOTO)).outputs


def test_compressed_messages_are_refused(calls: Any) -> None:
    """A small one could become a huge one."""
    import grpc

    error = failed(calls.ModelInfer, image_request(PHOTO), compression=grpc.Compression.Gzip)
    assert error.code().name == "UNIMPLEMENTED"


def test_call_without_a_message_is_malformed(running: ServerThread) -> None:
    """And of several messages, the first one counts."""
    first = image_request(PHOTO).SerializeToString()
    with channel(running.grpc_address) as opened:
        assert_failed(*MALFORMED, opened.stream_unary(INFER), iter([]))
        assert opened.stream_unary(INFER)(iter([first, b"\xff"]))


def admitted(running: ServerThread, requests: int) -> bool:
    return running.engine_client.requests == requests


def test_slow_uploads_give_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the first one beyond --max-queue that would wait for them, once they have had their time."""
    monkeypatch.setattr("rednet.service.parsing.memory_budget.UPLOAD_GRACE_S", 0.2)
    over = threading.Event()

    def stalled() -> Iterator[bytes]:
        over.wait(PATIENCE_S)
        yield b""

    with ServerThread(FakeRunner(), grpc_port=0, max_queue=2) as running, channel(running.grpc_address) as opened:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        slow = []
        for count in (1, 2):
            slow.append(opened.stream_unary(INFER).future(stalled()))
            wait_until(partial(admitted, running, count), "the start of an upload")
        time.sleep(0.3)
        image = image_request(PHOTO).SerializeToString()
        assert opened.unary_unary(INFER)(image)
        refused = assert_failed("RESOURCE_EXHAUSTED", "OVERLOADED", slow[0].result)
        assert "slow upload" in refused.details()
        assert not slow[1].done()
        over.set()
        assert_failed("NOT_FOUND", "NOT_FOUND", slow[1].result)  # an empty message names no model
