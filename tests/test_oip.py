"""Infer requests and responses of the Open Inference Protocol, valid and malicious."""

import base64
import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rednet.service.errors import MalformedRequest, PayloadTooLarge
from rednet.service.parsing.bodies import InferOptions, ParsedBody
from rednet.service.parsing.oip import encode_infer, highest_values, parse_infer

MOST = 4
ONE: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}
HUGE = [2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**400]


def request(tail: bytes = b"", *, header_length: str | None = "", outputs: Any = None, **tensor: Any) -> ParsedBody:
    """Parse a request with one input. With a header length of "", the right one is used."""
    wanted = {"inputs": [tensor]} | ({} if outputs is None else {"outputs": outputs})
    header = json.dumps(wanted).encode()
    return parse_infer(str(len(header)) if header_length == "" else header_length, header + tail, MOST)


def options(parsed: ParsedBody) -> InferOptions:
    assert parsed.infer
    return parsed.infer


def photos(*data: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in data)


def photo_tensor(count: Any, size: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [count], "parameters": {"binary_data_size": size}}


def pixel_tensor(shape: Any, **more: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "FP32", "shape": shape, **more}


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=MOST))
def test_photos_are_read_unchanged(data: list[bytes]) -> None:
    """From binary elements and from base64 in JSON."""
    tail = photos(*data)
    assert request(tail, **photo_tensor(len(data), len(tail))).images == data
    texts = [base64.b64encode(each).decode() for each in data]
    assert request(name="image", datatype="BYTES", shape=[len(data)], data=texts).images == data


@given(st.lists(st.floats(width=32), min_size=12, max_size=12))
def test_pixels_are_read_unchanged(values: list[float]) -> None:
    """Bit for bit, from binary data, from a flat list, and from nested lists."""
    array = np.array(values, "<f4").reshape(2, 3, 1, 2)
    tail = array.tobytes()
    ways = [request(tail, **pixel_tensor([2, 3, 1, 2], parameters={"binary_data_size": len(tail)}))]
    if np.isfinite(array).all():
        ways += [request(**pixel_tensor([2, 3, 1, 2], data=data)) for data in (array.ravel().tolist(), array.tolist())]
    for way in ways:
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in way.images]), array)


def test_all_outputs_are_returned_unless_some_are_named() -> None:
    """Each output's own binary setting takes precedence over that of the request."""
    assert request(**ONE, header_length=None).infer == InferOptions(None, {})
    named: list[dict[str, Any]] = [{"name": "features", "parameters": {"binary_data": False}}, {"name": "logits"}]
    assert list(options(request(**ONE, outputs=named)).outputs.items()) == [("features", False), ("logits", False)]
    for_all = {"inputs": [ONE], "outputs": named, "parameters": {"binary_data_output": True}, "id": "7"}
    asked = options(parse_infer(None, json.dumps(for_all).encode(), MOST))
    assert (asked.id, asked.outputs) == ("7", {"features": False, "logits": True})
    del for_all["outputs"]
    assert options(parse_infer(None, json.dumps(for_all).encode(), MOST)) == InferOptions("7", {}, binary=True)


@pytest.mark.parametrize(
    ("tail", "tensor"),
    [
        (b"", photo_tensor(1, 0)),  # fewer elements than the shape says
        (photos(b"a", b"b"), photo_tensor(1, 10)),  # more
        (photos(b"a"), photo_tensor(1, 4)),  # more bytes than the size says
        (photos(b"a"), photo_tensor(1, 6)),  # fewer bytes than the size says
        (photos(b"abc")[:-1], photo_tensor(1, 6)),  # a truncated element
        (b"\xff\xff\xff\xff", photo_tensor(1, 4)),  # an element that claims 4 GB
        (b"\x01\0", photo_tensor(1, 2)),  # a truncated length
        *((b"", photo_tensor(1, size)) for size in (*HUGE, -1, 1.0, True, "4", None)),
        *((b"", photo_tensor(count, 0)) for count in (-1, -(2**63), 1.0, True, "1", None, [1], 2**64, 10**400)),
        (b"", photo_tensor(0, 0)),
        (b"", {**photo_tensor(1, 0), "shape": []}),
        (b"", {**photo_tensor(1, 0), "shape": [1, 1]}),
        (b"", {**photo_tensor(1, 0), "shape": 1}),
        (b"", {**photo_tensor(1, 0), "datatype": "FP32"}),
        (b"", {**photo_tensor(1, 0), "datatype": "B" * 1000}),
        (b"", {**photo_tensor(1, 0), "name": "picture"}),
        (photos(b"a"), {**photo_tensor(1, 5), "data": ["AAAA"]}),  # data in both places
        (b"", {"name": "image", "datatype": "BYTES", "shape": [1]}),  # data in neither place
        *(
            (b"", {"name": "image", "datatype": "BYTES", "shape": [1], "data": data})
            for data in ([], [1], [["AA"]], "A")
        ),
        (b"", pixel_tensor([1, 3, 2, 2], data=[0.0] * 11)),
        (b"", pixel_tensor([1, 3, 2, 2], data=[[0.0] * 12])),
        (b"", pixel_tensor([1, 3, 1, 1], data=[[1.0], [1.0, 2.0], [3.0]])),
        (b"", pixel_tensor([1, 3, 1, 1], data=["a", "b", "c"])),
        *((b"", pixel_tensor([1, 3, 1, 1], data=[1.0, 2.0, each])) for each in ("3.0", True, None)),
        (b"", pixel_tensor([1, 3, 1, 1], data=[{}, {}, {}])),
        (b"", pixel_tensor([1, 3, 1, 1], data=[float("nan")] * 3)),  # NaN is not valid JSON
        (b"", pixel_tensor([1, 1, 1, 1], data=json.loads("[" * 100 + "1" + "]" * 100))),
        (b"", pixel_tensor([3, 1, 1], data=[0.0] * 3)),
        (b"", pixel_tensor([1, 3, 0, 2**63], data=[])),
        (b"", pixel_tensor([1, 3, 2**63, 0], parameters={"binary_data_size": 0})),
        (b"", pixel_tensor([1, 3, 1, 1], data=[1.0, 2.0, [3.0]])),
        (b"", pixel_tensor([2, 3, 1, 1], data=[[[[1.0]]] * 3, [[[1.0]]] * 2])),
        (b"\0" * 12, pixel_tensor([1, 3, 1, 1], parameters={"binary_data_size": 12}, datatype="FP16")),
        *(
            (
                b"\0" * 8,
                pixel_tensor([1, side, side, side], parameters={"binary_data_size": 8}),
            )  # the product overflows 64 bits
            for side in (2**31, 2**32, 2**63, 2**64 - 1)
        ),
    ],
)
def test_tensor_that_does_not_match_its_data_is_malformed(tail: bytes, tensor: dict[str, Any]) -> None:
    """Claimed sizes and shapes are checked against the body's bytes."""
    with pytest.raises(MalformedRequest) as caught:
        request(tail, **tensor)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("header_length", ["", "-1", "1e2", "²", "10000", "9" * 19, "9" * 5000, "0", "3"])
def test_wrong_header_length_is_malformed(header_length: str) -> None:
    """Not a number, beyond the body, or within the JSON."""
    with pytest.raises(MalformedRequest):
        parse_infer(header_length, b'{"inputs": []}', MOST)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"inputs": []}',
        b'{"inputs": {}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b'{"id": 7}',
    ],
)
def test_json_that_does_not_match_the_schema_is_malformed(body: bytes) -> None:
    """At any depth."""
    with pytest.raises(MalformedRequest):
        parse_infer(None, body, MOST)


def test_json_with_very_many_lists_is_rejected_before_parsing() -> None:
    """Parsing would block the event loop for seconds."""
    with pytest.raises(MalformedRequest, match="lists and objects; at most"):
        parse_infer(None, b'{"inputs": [' + b"[]," * 1_000_000 + b"[]]}", MOST)


def test_two_inputs_and_unknown_outputs_are_malformed() -> None:
    """A request contains photos or pixels, and outputs have known names."""
    with pytest.raises(MalformedRequest, match="inputs"):
        parse_infer(None, json.dumps({"inputs": [ONE, ONE]}).encode(), MOST)
    wrong: list[Any] = [[{"name": "scores"}], [{}], "logits", [{"name": "logits", "parameters": {"binary_data": 1}}]]
    for outputs in wrong:
        with pytest.raises(MalformedRequest, match="outputs"):
            request(**ONE, outputs=outputs)


@pytest.mark.parametrize("count", [MOST + 1, 2**31, 2**63, 2**64 - 1])
def test_shape_with_more_images_than_the_limit_is_rejected(count: int) -> None:
    """The shape is checked before anything is allocated."""
    for tensor in (photo_tensor(count, 0), pixel_tensor([count, 3, 1, 1], data=[])):
        with pytest.raises(PayloadTooLarge, match="more than 4 images"):
            request(**tensor)


numbers = st.integers(-2, 6) | st.sampled_from([*HUGE, -(2**63), 1e300, 1.5, True, None, "1", float("nan")])
values = st.recursive(numbers | st.text(max_size=4), lambda inner: st.lists(inner, max_size=4), max_leaves=8)
sound = [ONE, photo_tensor(2, 12), pixel_tensor([1, 3, 1, 1], parameters={"binary_data_size": 12})]
wrong = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "pixels", "pixel"]),
        "datatype": st.sampled_from(["BYTES", "FP32", "FP16"]) | numbers,
        "shape": st.lists(numbers, max_size=5) | st.sampled_from([[1], [2], [1, 3, 1, 1], [1, 3, 0, 2**63]]) | numbers,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": numbers | st.just(12)}),
        "data": values,
    },
)
tensors = st.builds(lambda tensor, changes: tensor | changes, st.sampled_from(sound), st.just({}) | wrong)
bodies: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, min_size=1, max_size=1) | values},
    optional={"id": st.text(max_size=4) | numbers, "outputs": st.just([]) | values, "parameters": st.just({}) | values},
)
header_lengths = st.none() | st.just("exact") | st.integers(-1, 400).map(str) | st.text(max_size=4)


@given(bodies, header_lengths, st.just(photos(b"ab", b"cd")) | st.binary(max_size=16))
def test_any_infer_request_is_parsed_or_malformed(body: dict[str, Any], header_length: str | None, tail: bytes) -> None:
    """Plausible requests with arbitrary values give as many images as the shape says, or a clear error."""
    header = json.dumps(body).encode()
    check_parser(str(len(header)) if header_length == "exact" else header_length, header + tail)


@given(header_lengths, st.binary(max_size=100))
def test_arbitrary_bytes_are_malformed(header_length: str | None, body: bytes) -> None:
    """They are a clear error."""
    check_parser(header_length, body)


def check_parser(header_length: str | None, body: bytes) -> None:
    try:
        asked = parse_infer(header_length, body, MOST)
    except (MalformedRequest, PayloadTooLarge):
        return
    assert 1 <= len(asked.images) <= MOST
    assert set(options(asked).outputs) <= {"logits", "probabilities", "features", "familiarity"}


def test_response_values_are_exact_in_json_and_binary() -> None:
    """JSON values are flat and exact to float32. Binary values follow it in little-endian order, output by output."""
    logits, features = np.array([[0.1, -2.5], [7, 8]], np.float32), np.array([[1e-30, 3.0, 4.0], [5, 6, 7]], np.float32)
    tensors = {"logits": list(logits), "features": list(features)}
    head, tail = encode_infer({"model_name": "m"}, tensors, {"logits": True, "features": True})
    answer = orjson.loads(b"".join(head))
    assert answer["model_name"] == "m"
    assert [output["parameters"]["binary_data_size"] for output in answer["outputs"]] == [16, 24]
    assert np.frombuffer(b"".join(tail), "<f4").tolist() == [*logits.ravel(), *features.ravel()]
    head, tail = encode_infer({}, tensors, {"logits": False, "features": False})
    assert list(tail) == []
    for output, tensor in zip(orjson.loads(b"".join(head))["outputs"], (logits, features), strict=True):
        assert output["shape"] == list(tensor.shape)
        assert np.array(output["data"], np.float32).tolist() == tensor.ravel().tolist()
    head, tail = encode_infer({}, tensors, {"logits": True, "features": False})
    first, second = orjson.loads(b"".join(head))["outputs"]
    assert first["parameters"] == {"binary_data_size": 16}
    assert np.array(second["data"], np.float32).tolist() == features.ravel().tolist()
    assert b"".join(tail) == logits.tobytes()


NULLS = {"id": None, "parameters": None, "outputs": None, "inputs": [ONE | {"parameters": None}]}


def test_null_in_an_optional_field_equals_an_absent_field() -> None:
    """At every level, because serialisers of other languages write null."""
    assert parse_infer(None, json.dumps(NULLS).encode(), MOST) == request(**ONE, header_length=None)
    none = dict.fromkeys(["binary_data", "classification", "shared_memory_region", "shared_memory_byte_size"])
    for parameters in (None, none):
        parsed = request(**ONE, header_length=None, outputs=[{"name": "logits", "parameters": parameters}])
        assert parsed.infer == InferOptions(None, {"logits": False}, {})
    tail = photos(b"a")
    assert request(tail, **photo_tensor(1, 5), data=None).images == [b"a"]
    body = json.dumps({"inputs": [ONE], "parameters": {"binary_data_output": None}}).encode()
    assert options(parse_infer(None, body, MOST)) == InferOptions(None, {})


def test_classification_is_read_per_output() -> None:
    """0 disables it, as in Triton. Anything but a count is an error."""
    named: list[dict[str, Any]] = [{"name": "logits", "parameters": {"classification": 3}}, {"name": "features"}]
    assert options(request(**ONE, header_length=None, outputs=named)).classes == {"logits": 3}
    named[0]["parameters"] = {"classification": 0}
    assert options(request(**ONE, header_length=None, outputs=named)).classes == {}
    for count in (-1, True, "3", 1.5, [3]):
        named[0]["parameters"] = {"classification": count}
        with pytest.raises(MalformedRequest, match="classification"):
            request(**ONE, header_length=None, outputs=named)


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"])
def test_shared_memory_is_rejected_for_inputs_and_outputs(name: str) -> None:
    """If it were ignored, the client would not find the response, or the server would not read the image."""
    with pytest.raises(MalformedRequest, match="input 'image': shared memory is not supported"):
        request(**ONE, header_length=None, parameters={name: "region"})
    with pytest.raises(MalformedRequest, match="output 'logits': shared memory is not supported"):
        request(**ONE, header_length=None, outputs=[{"name": "logits", "parameters": {name: 0}}])


def test_unknown_parameters_are_accepted_and_reserved_ones_rejected() -> None:
    """As by Triton's HTTP endpoint."""
    fine = {"sequence_id": 7, "sequence_start": True, "priority": 1, "timeout": 1000, "mine": "x", "headers": {}}
    body = {"inputs": [ONE], "parameters": fine}
    assert parse_infer(None, json.dumps(body).encode(), MOST).images == [bytes(3)]
    body["parameters"] = {"triton_enable_empty_final_response": True}
    with pytest.raises(MalformedRequest, match=r"triton_enable_empty_final_response.* is reserved"):
        parse_infer(None, json.dumps(body).encode(), MOST)


@pytest.mark.parametrize("wrong_id", ["a" * 1025, "a\n", "\0", "\x1b[2J", "\x85", "\u2028", 7, ["a"]])
def test_id_that_is_long_or_not_printable_is_malformed(wrong_id: Any) -> None:
    """Ids of up to 1,024 printable characters are echoed unchanged."""
    with pytest.raises(MalformedRequest, match="id"):
        parse_infer(None, json.dumps({"id": wrong_id, "inputs": [ONE]}).encode(), MOST)
    good = "é 名 🙂" + "a" * 1000
    assert options(parse_infer(None, json.dumps({"id": good, "inputs": [ONE]}).encode(), MOST)).id == good


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [], "inputs": []}', "inputs"),
        (
            b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"], "data": ["BB"]}]}',
            "data",
        ),
        (b'{"id": "\\ud800", "inputs": []}', "cannot be read"),
    ],
)
def test_infer_json_with_duplicate_keys_or_lone_surrogates_is_malformed(body: bytes, message: str) -> None:
    """A tensor must not be silently dropped, and a lone surrogate could not be echoed."""
    with pytest.raises(MalformedRequest, match=message):
        parse_infer(None, body, MOST)


def test_output_requested_twice_is_malformed() -> None:
    """One of the two requests would be dropped."""
    named = [{"name": "logits", "parameters": {"classification": 1}}, {"name": "logits"}]
    with pytest.raises(MalformedRequest, match="'logits' is listed twice"):
        request(**ONE, header_length=None, outputs=named)


def test_classification_output_has_the_format_of_triton() -> None:
    """Value, index and label, best first, equal values in order, and at most as many as there are classes."""
    row = np.array([1, 5, 10, 5], np.float32)
    assert highest_values(row, ["a", "b", "c:d", "e"], 3) == ["10.000000:2:c:d", "5.000000:1:b", "5.000000:3:e"]
    assert highest_values(row, (), 9) == ["10.000000:2", "5.000000:1", "5.000000:3", "1.000000:0"]


def test_texts_are_encoded_as_bytes_tensors() -> None:
    """In JSON as strings, and in binary data each after its length in UTF-8."""
    rows: dict[str, Any] = {
        "logits": [["1:0:é", "2:1:b"], ["3:2:c", "4:3:d"]],
        "features": [np.zeros(3, np.float32)] * 2,
    }
    head, tail = encode_infer({}, rows, {"logits": True, "features": False})
    first, second = orjson.loads(b"".join(head))["outputs"]
    expected = photos("1:0:é".encode(), b"2:1:b", b"3:2:c", b"4:3:d")
    assert (first["datatype"], first["shape"], second["datatype"]) == ("BYTES", [2, 2], "FP32")
    assert b"".join(tail) == expected
    assert first["parameters"]["binary_data_size"] == len(expected)
    head, tail = encode_infer({}, rows, {"logits": False, "features": False})
    assert orjson.loads(b"".join(head))["outputs"][0]["data"] == ["1:0:é", "2:1:b", "3:2:c", "4:3:d"]
    assert not list(tail)
