"""Parses infer requests of the Open Inference Protocol and encodes the responses.

Over HTTP, a body is a JSON object that describes every tensor. Values that are not in the JSON follow as binary data,
tensor by tensor (Triton's binary tensor data extension). Over gRPC (`rednet.service.grpc`), a message holds the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from rednet.service.errors import MalformedRequest
from rednet.service.parsing.base64_text import decode_base64
from rednet.service.parsing.bodies import InferOptions, ParsedBody
from rednet.service.parsing.json_text import load_json
from rednet.service.parsing.multipart import too_many
from rednet.service.parsing.oip_schemas import InferBody, InferInput, InputParameters, OutputParameters
from rednet.service.parsing.validation_errors import first_error
from rednet.service.types import Floats, Upload

HEADER_LENGTH = "Inference-Header-Content-Length"  # names the header with the size of the JSON before the binary data
Row = Floats | list[str]  # of an output: an array of numbers, which may have no dimension, or strings
LENGTH_BYTES = 4  # size of the length prefix of each element of a BYTES tensor


def parse_infer(header_length: str | None, body: bytes, max_images: int) -> ParsedBody:
    """Parse the body of an infer request.

    Args:
        header_length: value of the `Inference-Header-Content-Length` header; None: the whole body is JSON.
        body: untrusted.
        max_images: in one request.

    Raises:
        MalformedRequest: the body does not follow the protocol, or its tensors are not those of this model.
        PayloadTooLarge: there are more than max_images.
    """
    json_bytes = _json_bytes(header_length, len(body))
    request = check_infer(load_json(body[:json_bytes], unique=[b'"inputs"', b'"data"']))
    (tensor,) = request.inputs
    images = read_images(tensor, _binary_data(tensor, memoryview(body)[json_bytes:]), max_images)
    return ParsedBody(images, infer_options(request))


def check_infer(request: object) -> InferBody:
    """Validate the description of an infer request.

    Args:
        request: JSON, or a gRPC message in the form of that JSON.

    Raises:
        MalformedRequest: it does not follow the protocol, or its input is in shared memory.
    """
    try:
        checked = InferBody.model_validate(request)
    except ValidationError as error:
        raise MalformedRequest(first_error(error)) from None
    for name in checked.parameters.model_dump() if checked.parameters else ():
        if name.startswith("triton_"):
            raise MalformedRequest(f"parameters: {name[:100]!r} is reserved: names must not begin with 'triton_'")
    for tensor in checked.inputs:
        _refuse_shared_memory(f"input {tensor.name!r}", tensor.parameters or InputParameters())
    return checked


def infer_options(request: InferBody) -> InferOptions:
    """The options of an infer request.

    Raises:
        MalformedRequest: an output is listed twice, or is requested in shared memory.
    """
    outputs = request.outputs or []
    binary = bool(request.parameters and request.parameters.binary_data_output)
    as_binary: dict[str, bool] = {}
    classes: dict[str, int] = {}
    for output in outputs:
        if output.name in as_binary:
            raise MalformedRequest(f"outputs: {output.name!r} is listed twice")
        parameters = output.parameters or OutputParameters()
        _refuse_shared_memory(f"output {output.name!r}", parameters)
        as_binary[output.name] = binary if parameters.binary_data is None else parameters.binary_data
        if parameters.classification:  # in Triton, 0 means no classification
            classes[output.name] = parameters.classification
    return InferOptions(request.id, as_binary, classes, binary)


def _refuse_shared_memory(what: str, parameters: InputParameters | OutputParameters) -> None:
    if any(name.startswith("shared_memory_") and value is not None for name, value in parameters):
        raise MalformedRequest(f"{what}: shared memory is not supported; use data or binary data")


def highest_values(row: Floats, labels: Sequence[str], count: int) -> list[str]:
    """Format a row's highest values as `value:index:label`, highest first, as Triton's classification extension does.

    Args:
        row: [values], or a single value.
        labels: one for each value, or an empty sequence.
        count: number of values, at least 1. If the row has fewer, all of them are returned.
    """
    values = row.reshape(-1)
    best = np.argsort(-values, kind="stable")[:count].tolist()
    return [f"{values[index]:f}:{index}" + (f":{labels[index]}" if labels else "") for index in best]


def encode_infer(
    answer: Mapping[str, Any], tensors: Mapping[str, Sequence[Row]], binary: Mapping[str, bool]
) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """Encode a response: the pieces of its JSON, and of the binary data that follows. No piece is larger than a row.

    Args:
        answer: all fields except `outputs`.
        tensors: rows of each output by name, in order.
        binary: by name, whether an output's values are sent as binary data.
    """
    tail = (row_bytes(row) for name, rows in tensors.items() if binary[name] for row in rows)
    return _json_pieces(answer, tensors, binary), tail


def _json_pieces(
    answer: Mapping[str, Any], tensors: Mapping[str, Sequence[Row]], binary: Mapping[str, bool]
) -> Iterator[bytes]:
    yield orjson.dumps({**answer, "outputs": []})[:-2]
    for index, (name, rows) in enumerate(tensors.items()):
        datatype = "BYTES" if isinstance(rows[0], list) else "FP32"
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": [len(rows), *row_shape(rows[0])]}
        if binary[name]:
            output["parameters"] = {"binary_data_size": sum(_row_size(row) for row in rows)}
        else:
            output["data"] = []
        whole = b"," * (index > 0) + orjson.dumps(output)
        if binary[name]:
            yield whole
            continue
        yield whole[:-2]
        for position, row in enumerate(rows):
            values = row.reshape(-1) if isinstance(row, np.ndarray) else row
            yield b"," * (position > 0) + orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        yield b"]}"
    yield b"]}"


def row_shape(row: Row) -> tuple[int, ...]:
    """The shape of an output without its first dimension, the number of images."""
    return row.shape if isinstance(row, np.ndarray) else (len(row),)


def _row_size(row: Row) -> int:
    return 4 * row.size if isinstance(row, np.ndarray) else sum(LENGTH_BYTES + len(text.encode()) for text in row)


def row_bytes(row: Row) -> bytes:
    """A row as binary data."""
    if isinstance(row, np.ndarray):
        return row.astype("<f4").tobytes()
    elements = [text.encode() for text in row]
    return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in elements)


def _json_bytes(header_length: str | None, body_bytes: int) -> int:
    if header_length is None:
        return body_bytes
    digits = header_length.isascii() and header_length.isdecimal() and len(header_length) < 20
    if not digits or int(header_length) > body_bytes:
        expected = f"from 0 to the size of the body, {body_bytes}"
        raise MalformedRequest(f"{HEADER_LENGTH} must be {expected}, not {header_length[:20]!r}")
    return int(header_length)


def read_images(
    tensor: InferInput, binary: memoryview | Sequence[memoryview] | None, max_images: int
) -> Sequence[Upload]:
    """The images in a tensor. Photos are views of the binary data, if there is any.

    Args:
        tensor: the description, and the values as JSON.
        binary: the values in binary, or the elements of a BYTES tensor, one by one; None: they are in the JSON.
        max_images: in one request.

    Raises:
        MalformedRequest: the values do not match the description, or the tensor is not one of this model.
        PayloadTooLarge: there are more than max_images.
    """
    if tensor.shape[0] == 0:
        raise MalformedRequest("the request holds no image")
    if tensor.shape[0] > max_images:
        raise too_many(max_images)
    return _photos(tensor, binary) if tensor.name == "image" else list(_pixels(tensor, binary))


def _binary_data(tensor: InferInput, tail: memoryview) -> memoryview | None:
    """The binary data of the only input, if it has any: the rest of the body."""
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if (tensor.data is None) == (size is None):
        raise MalformedRequest(f"input {tensor.name!r} must have either data or binary_data_size")
    if len(tail) != (size or 0):
        raise MalformedRequest(f"{len(tail)} bytes follow the JSON, but binary_data_size is {size or 0}")
    return None if size is None else tail


def _photos(tensor: InferInput, binary: memoryview | Sequence[memoryview] | None) -> Sequence[Upload]:
    if tensor.datatype != "BYTES" or len(tensor.shape) != 1:
        raise MalformedRequest(f"input 'image' must be BYTES [N], not {tensor.datatype} {tensor.shape}")
    (images,) = tensor.shape
    if isinstance(binary, memoryview):
        return _elements(binary, images)
    if binary is not None:
        if len(binary) != images:
            raise MalformedRequest(f"input 'image' has {len(binary)} elements, but its shape is {tensor.shape}")
        return binary
    data = tensor.data or []
    texts = [text for text in data if isinstance(text, str)]
    if not len(texts) == len(data) == images:
        raise MalformedRequest(
            f"the data of input 'image' must be base64 strings, as many as its shape {tensor.shape} says"
        )
    return [decode_base64(text) for text in texts]


def _elements(tail: memoryview, count: int) -> Sequence[memoryview]:
    """The elements of a BYTES tensor. Each follows its length, a little-endian uint32."""
    elements: list[memoryview] = []
    position = 0
    for _ in range(count):
        start = position + LENGTH_BYTES
        position = start + int.from_bytes(tail[position:start], "little")
        if position > len(tail):
            break
        elements.append(tail[start:position])
    if len(elements) < count or position != len(tail):
        expected = f"as many elements as its shape [{count}] says, each after its length in {LENGTH_BYTES} bytes"
        raise MalformedRequest(f"the {len(tail)} bytes of binary data of input 'image' must be {expected}")
    return elements


def _pixels(tensor: InferInput, binary: memoryview | Sequence[memoryview] | None) -> Floats:
    """Copy the values of an FP32 tensor to an array of its shape."""
    if tensor.datatype != "FP32" or len(tensor.shape) != 4 or 0 in tensor.shape:
        raise MalformedRequest(f"input 'pixels' must be FP32 [N, 3, H, W], not {tensor.datatype} {tensor.shape}")
    values = prod(tensor.shape)  # a Python integer, which cannot overflow
    if binary is not None:
        packed = binary if isinstance(binary, memoryview) else b"".join(binary)
        if len(packed) != 4 * values:
            raise MalformedRequest(f"input 'pixels': FP32 {tensor.shape} takes {4 * values} bytes, not {len(packed)}")
        return np.frombuffer(packed, "<f4").astype(np.float32).reshape(tensor.shape)
    try:
        flat = _flat(tensor.data or [], tensor.shape)
        if not {*map(type, flat)} <= {int, float}:  # NumPy would also accept strings and booleans
            raise TypeError
        with np.errstate(over="ignore"):  # values beyond the range of float32 become infinite
            return np.fromiter(flat, np.float32, values).reshape(tensor.shape)
    except (ValueError, TypeError, OverflowError):
        expected = f"{values} numbers, flat or nested {tensor.shape}"
        raise MalformedRequest(f"the data of input 'pixels' must be {expected}") from None


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Flatten a list that is flat or nested like the shape. NumPy alone would accept any nesting.

    Raises:
        ValueError: the list does not match the shape.
    """
    if len(data) == prod(shape):
        return data
    rows = [data]
    for length in shape:
        if not all(isinstance(row, list) and len(row) == length for row in rows):
            raise ValueError
        rows = [value for row in rows for value in row]
    return rows
