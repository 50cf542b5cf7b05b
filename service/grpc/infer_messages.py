"""Parses `ModelInferRequest` and encodes `ModelInferResponse`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rednet.service import open_inference
from rednet.service.errors import MalformedRequest
from rednet.service.grpc.messages import decode, message_class
from rednet.service.grpc.wire import Taken, field, split
from rednet.service.model_description import ModelBody
from rednet.service.parsing.bodies import BodyLimits, ParsedBody
from rednet.service.parsing.body_parser import with_checked_pixels
from rednet.service.parsing.multipart import too_many
from rednet.service.parsing.oip import Row, check_infer, infer_options, read_images, row_bytes, row_shape

ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
InferInputTensor = message_class("ModelInferRequest.InferInputTensor")

INPUTS, RAW_CONTENTS = 5, 7  # fields of ModelInferRequest
CONTENTS = 5  # of InferInputTensor
FLOATS, BYTES = 6, 8  # of InferTensorContents
ONE_INPUT = MalformedRequest("inputs: must have exactly 1 item, 'image' or 'pixels'")
ONE_RAW_CONTENTS = MalformedRequest("raw_input_contents: must have exactly 1 item, for the only input")
ONE_CONTENTS = MalformedRequest("inputs.0.contents: must occur only once")
PACKED = MalformedRequest("inputs.0.contents: fp32_contents must be packed")


class InferRequest(NamedTuple):
    """A request.

    Attributes:
        body: images and options.
        raw: whether values came as raw contents; the response then has raw contents, too.
    """

    body: ParsedBody
    raw: bool


def parse_request(message: memoryview, model: ModelBody, limits: BodyLimits) -> InferRequest:
    """Parse a `ModelInferRequest`. Photos are views of the message.

    Args:
        message: untrusted.
        model: that is served.
        limits: on the images.

    Raises:
        MalformedRequest: the message does not follow the protocol, or its tensors are not those of this model.
        NotFound: it is for another model.
        PayloadTooLarge: there are too many images.
    """
    head, values = split(message, {INPUTS: Taken(1, ONE_INPUT), RAW_CONTENTS: Taken(1, ONE_RAW_CONTENTS)})
    request = decode(ModelInferRequest, head)
    open_inference.check_model(model, request.model_name, request.model_version)
    if not values[INPUTS]:
        raise ONE_INPUT
    head, of_tensor = split(values[INPUTS][0], {CONTENTS: Taken(1, ONE_CONTENTS)})
    tensor = decode(InferInputTensor, head)
    checked = check_infer(
        {
            "id": request.id or None,
            "inputs": [
                {
                    "name": tensor.name,
                    "datatype": tensor.datatype,
                    "shape": list(tensor.shape),
                    "parameters": _parameters(tensor),
                }
            ],
            "outputs": [{"name": each.name, "parameters": _parameters(each)} for each in request.outputs],
            "parameters": _parameters(request),
        }
    )
    asked = infer_options(checked)
    open_inference.requested_outputs(asked, model)
    raw, contents = values[RAW_CONTENTS], of_tensor[CONTENTS]
    if len(raw) == len(contents):
        raise MalformedRequest(f"input {tensor.name!r} must have either contents or raw_input_contents")
    binary = raw[0] if raw else _typed(tensor.name, contents[0], limits.max_images)
    images = read_images(checked.inputs[0], binary, limits.max_images)
    return InferRequest(with_checked_pixels(ParsedBody(images, asked), limits), bool(raw))


def encode_response(model: ModelBody, request_id: str | None, tensors: Mapping[str, Sequence[Row]], raw: bool) -> bytes:
    """Encode a `ModelInferResponse`.

    Args:
        model: that was used.
        request_id: of the request, if it had one.
        tensors: rows of each output by name, in order.
        raw: send values as raw contents.
    """
    response = ModelInferResponse(model_name=model.name, model_version=open_inference.MODEL_VERSION, id=request_id)
    for name, rows in tensors.items():
        is_text = isinstance(rows[0], list)
        shape = [len(rows), *row_shape(rows[0])]
        output = response.outputs.add(name=name, datatype="BYTES" if is_text else "FP32", shape=shape)
        if raw:
            response.raw_output_contents.append(b"".join(map(row_bytes, rows)))
        elif is_text:
            output.contents.bytes_contents.extend(text.encode() for row in rows for text in row)
        else:  # a hundred times as fast as appending numbers
            output.contents.MergeFromString(field(FLOATS, b"".join(map(row_bytes, rows))))
    serialized: bytes = response.SerializeToString()
    return serialized


def _parameters(message: Any) -> dict[str, Any] | None:
    values = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = choice and getattr(parameter, choice)
    return values or None


def _typed(name: str, contents: memoryview, max_images: int) -> Sequence[memoryview]:
    """The elements of a BYTES tensor, or the packed values of an FP32 tensor."""
    others, values = split(contents, {BYTES: Taken(max_images, too_many(max_images)), FLOATS: Taken(1, PACKED)})
    expected, unexpected = (BYTES, FLOATS) if name == "image" else (FLOATS, BYTES)
    if others or values[unexpected]:
        kind = "bytes_contents" if expected == BYTES else "packed fp32_contents"
        raise MalformedRequest(f"the contents of input {name!r} must be {kind}")
    return values[expected]
