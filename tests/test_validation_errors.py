"""Errors of JSON fields and query parameters are worded for clients, not for users of Pydantic."""

import json
from typing import Any

import pytest

from rednet.service.errors import MalformedRequest
from rednet.service.parsing.embeddings import parse_embeddings
from rednet.service.parsing.oip import parse_infer
from tests.servers import ServerProcess

PHOTO: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "body: must be an object, not a list"),
        ({}, "inputs: this field is required"),
        ({"inputs": None}, "inputs: must be a list, not null"),
        ({"inputs": []}, "inputs: must have at least 1 item"),
        ({"inputs": [PHOTO, PHOTO]}, "inputs: must have at most 1 item"),
        ({"inputs": [PHOTO | {"name": "x" * 99}]}, f"inputs.0.name: must be 'image' or 'pixels', not '{'x' * 40}'..."),
        ({"inputs": [PHOTO | {"datatype": "x" * 99}]}, "inputs.0.datatype: must have at most 16 characters"),
        ({"inputs": [PHOTO | {"shape": [-1]}]}, "inputs.0.shape.0: must be at least 0, not -1"),
        ({"inputs": [PHOTO | {"shape": [1.5]}]}, "inputs.0.shape.0: must be a whole number, not 1.5"),
        ({"inputs": [PHOTO], "id": True}, "id: must be a string, not true"),
        (
            {"inputs": [PHOTO], "parameters": {"binary_data_output": "yes"}},
            "parameters.binary_data_output: must be true or false, not 'yes'",
        ),
    ],
)
def test_invalid_infer_request_is_described(body: object, message: str) -> None:
    """The field, what is expected and what was found."""
    with pytest.raises(MalformedRequest) as refused:
        parse_infer(None, json.dumps(body).encode(), 8)
    assert refused.value.message == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x"}, "model: this field is required"),
        ({"model": "m", "input": "x", "foo": 1}, "foo: there is no such field"),
        ({"model": "m", "input": "x", "encoding_format": "x"}, "encoding_format: must be 'float' or 'base64', not 'x'"),
        ({"model": "m", "input": [[1, 2]]}, "input.0: must be a string, not a list; this model embeds images, "),
        ({"model": "m", "input": "x", "dimensions": "5"}, "dimensions: must be a whole number, not '5'"),
    ],
)
def test_invalid_embeddings_request_is_described(body: object, message: str) -> None:
    """As above, with a hint that texts are not embedded."""
    with pytest.raises(MalformedRequest) as refused:
        parse_embeddings(json.dumps(body).encode(), 8)
    assert refused.value.message.startswith(message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/predict?top_k=0", "query.top_k: must be at least 1, not '0'"),
        ("/v1/predict?top_k=many", "query.top_k: must be a whole number, not 'many'"),
        ("/v1/features?normalize=perhaps", "query.normalize: must be true or false, not 'perhaps'"),
        (
            "/v1/explain?layer=stem",
            "query.layer: must be 'class', 'stage1', 'stage2', 'stage3' or 'stage4', not 'stem'",
        ),
    ],
)
def test_invalid_query_parameter_is_described(server: ServerProcess, path: str, message: str) -> None:
    response = server.client.post(path, content=b"x")
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)


def test_unknown_path_and_method_are_described(server: ServerProcess) -> None:
    """The path, and the method to use instead."""
    message = server.client.get("/v1/nothing").json()["error"]["message"]
    assert message == "there is no '/v1/nothing' here"
    message = server.client.put("/v1/predict").json()["error"]["message"]
    assert message == "PUT is not supported for '/v1/predict'; use POST"
