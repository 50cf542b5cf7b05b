"""`/v1/embeddings` on real servers, with the `openai` package as it is and with plain requests."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import encoded, photo
from tests.http_helpers import CUT, TEXT, assert_error, sample
from tests.servers import ServerProcess, wait_until

openai = pytest.importorskip("openai", reason="needs the package openai")

EMBEDDINGS = "/v1/embeddings"
KEY = "sk-0123456789abcdef"
PHOTOS = [encoded(photo(seed), "JPEG") for seed in range(3)]


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two front ends"])
def guarded(request: pytest.FixtureRequest, tiny_path: Path, tmp_path_factory: Any) -> Iterator[ServerProcess]:
    """A server that requires a key, as one process and as several."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    options = ("--checkpoint", tiny_path, "--api-key-file", keys, "--frontends", request.param)
    with ServerProcess(*options) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture
def client(guarded: ServerProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def url(data: bytes, head: str = "data:image/jpeg;base64,") -> str:
    return head + base64.b64encode(data).decode()


def vectors(response: Any) -> NDArray[np.float64]:
    return np.array([entry.embedding for entry in response.data])


def features(running: ServerProcess, *photos: bytes) -> NDArray[np.float64]:
    files = [("f", (f"{index}.jpg", data)) for index, data in enumerate(photos)]
    return np.array(running.client.post("/v1/features", files=files).json()["features"])


def ask(running: ServerProcess, **body: Any) -> httpx.Response:
    return running.client.post(EMBEDDINGS, json={"model": "tiny", "input": url(PHOTOS[0])} | body)


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}], ids=["base64 by default", "float"])
def test_embeddings_of_the_openai_client_equal_features(guarded: ServerProcess, client: Any, encoding: Any) -> None:
    for data in PHOTOS:
        found = client.embeddings.create(model="tiny", input=url(data), **encoding)
        np.testing.assert_allclose(vectors(found), features(guarded, data), rtol=0, atol=1e-6)


def test_openai_client_gets_an_embedding_for_every_image_in_order(guarded: ServerProcess, client: Any) -> None:
    """The batches of the engine may be others than those of `/v1/features`."""
    found = client.embeddings.create(model="tiny", input=[url(data) for data in PHOTOS], user="me", dimensions=512)
    assert (found.object, found.model) == ("list", "tiny")
    assert [(entry.object, entry.index) for entry in found.data] == [("embedding", index) for index in range(3)]
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (0, 0)
    np.testing.assert_allclose(vectors(found), features(guarded, *PHOTOS), rtol=1e-3, atol=1e-5)


def test_embeddings_as_base64_are_little_endian_float32(guarded: ServerProcess) -> None:
    (entry,) = ask(guarded, encoding_format="base64").json()["data"]
    as_text = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
    as_numbers = ask(guarded).json()["data"][0]["embedding"]
    np.testing.assert_allclose(as_text, as_numbers, rtol=0, atol=1e-6)


def test_embeddings_take_base64_without_a_data_url(guarded: ServerProcess) -> None:
    """As the other endpoints do in JSON, with null for absent fields."""
    given = ask(guarded, input=[url(PHOTOS[0], "")], dimensions=None, encoding_format=None, user=None)
    np.testing.assert_allclose(given.json()["data"][0]["embedding"], features(guarded, PHOTOS[0])[0], atol=1e-6)


def test_embeddings_of_a_large_body_equal_features(guarded: ServerProcess, client: Any) -> None:
    """Its JSON of 3 MB is parsed in a process of its own."""
    large = encoded(photo(0, 1200, 1000).effect_spread(2), "PNG")
    found = client.embeddings.create(model="tiny", input=[url(large, "data:image/png;base64,")] * 2)
    assert len(large) > 1_000_000
    np.testing.assert_allclose(vectors(found), features(guarded, large, large), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "kind", "code", "message"),
    [
        ({"model": "text-embedding-3-small"}, "NotFoundError", "not_found", "this server has 'tiny'"),
        ({"input": "a dog in the park"}, "BadRequestError", "malformed_request", "input.0: .* and no text"),
        (
            {"input": [url(PHOTOS[0]), "dogs"]},
            "BadRequestError",
            "malformed_request",
            "input.1: not an image; .* no text",
        ),
        ({"input": [1, 2, 3]}, "BadRequestError", "malformed_request", "input.0: .* not .*; .* no text"),
        ({"input": [[1, 2], [3]]}, "BadRequestError", "malformed_request", "input.0: .* not .*; .* no text"),
        ({"input": []}, "BadRequestError", "malformed_request", "no image"),
        ({"input": "https://example.com/a.jpg"}, "BadRequestError", "malformed_request", "does not fetch images"),
        ({"dimensions": 256}, "BadRequestError", "malformed_request", "dimensions: this model has 512, not 256"),
        ({"encoding_format": "int8"}, "BadRequestError", "malformed_request", "encoding_format: .*'base64'"),
        ({"extra_body": {"normalize": True}}, "BadRequestError", "malformed_request", "normalize: .* no such field"),
        ({"input": [url(PHOTOS[0]), url(CUT)]}, "UnprocessableEntityError", "unreadable_image", "image 1: "),
        ({"input": [url(TEXT), url(PHOTOS[0])]}, "APIStatusError", "unsupported_media_type", "image 0: "),
        ({"input": [url(PHOTOS[0])] * 257}, "APIStatusError", "payload_too_large", "256"),
    ],
)
def test_openai_client_shows_code_and_message_of_an_error(
    client: Any, body: Any, kind: str, code: str, message: str
) -> None:
    with pytest.raises(getattr(openai, kind), match=message) as caught:
        client.embeddings.create(**{"model": "tiny", "input": url(PHOTOS[0])} | body)
    assert caught.value.code == code


def test_openai_client_without_a_valid_key_is_401(guarded: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="API key is not valid") as caught:
        client.embeddings.create(model="tiny", input=url(PHOTOS[0]))
    assert caught.value.code == "unauthorized"


def test_body_that_is_not_an_embeddings_request_is_400(server: ServerProcess) -> None:
    """Not JSON, and with a field that occurs twice."""
    assert_error(server.client.post(EMBEDDINGS, content=PHOTOS[0]), 400, "malformed_request")
    twice = json.dumps({"model": "tiny", "input": url(PHOTOS[0])})[:-1] + ', "input": "AAAA"}'
    assert_error(server.client.post(EMBEDDINGS, content=twice), 400, "malformed_request")
    bodies: list[Any] = [{}, {"model": "tiny"}, {"input": url(PHOTOS[0])}, []]
    for body in bodies:
        assert_error(server.client.post(EMBEDDINGS, json=body), 400, "malformed_request")


def test_embeddings_are_counted_under_their_own_endpoint(server: ServerProcess) -> None:
    def counts() -> list[float]:
        return [
            sample(server.client, "rednet_request_duration_seconds_count", endpoint=EMBEDDINGS, status="200"),
            sample(server.client, "rednet_images_total", endpoint=EMBEDDINGS, outcome="ok"),
        ]

    before = counts()
    response = ask(server, input=[url(data) for data in PHOTOS])
    assert response.headers["server-timing"].startswith("decode;dur=")
    wait_until(lambda: [b - a for a, b in zip(before, counts(), strict=True)] == [1, 3], "the counts")


def test_openapi_describes_embeddings(server: ServerProcess) -> None:
    """With an example. The schema of the request accepts what the server accepts."""
    document = server.client.get("/openapi.json").json()
    operation = document["paths"][EMBEDDINGS]["post"]
    described = operation["requestBody"]["content"]["application/json"]
    assert described["example"]["input"][0].startswith("data:image/jpeg;base64,")
    assert described["schema"]["$ref"] == "#/components/schemas/EmbeddingsRequestBody"
    assert document["components"]["schemas"]["EmbeddingsRequestBody"]["required"] == ["model", "input"]
    assert {"200", "401", "404", "413", "429"} <= operation["responses"].keys()
