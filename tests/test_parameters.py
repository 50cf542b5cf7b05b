"""Unknown query parameters, on a real server."""

from collections.abc import Iterator

import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import assert_error
from tests.servers import FakeRunner, ServerThread


@pytest.fixture(scope="module")
def running() -> Iterator[ServerThread]:
    with ServerThread(FakeRunner()) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/predict?topk=1", "did you mean top_k?"),
        ("/v1/predict?TOP_K=1", "did you mean top_k?"),
        ("/v1/predict?top_k=1&top_k=2", "query.top_k: given more than once"),
        ("/v1/predict?top_k=1&verbose=1", "query.verbose: unknown parameter; this endpoint has top_k"),
        ("/v1/predict?=1", "query.: unknown parameter"),
        ("/v1/features?normalise=true", "did you mean normalize?"),
        ("/v1/explain?layers=stage1", "did you mean layer?"),
        ("/v1/explain?top=1", "this endpoint has class, group, layer"),
    ],
)
def test_unknown_query_parameter_is_400_with_a_suggestion(running: ServerThread, path: str, message: str) -> None:
    """If it were ignored, the response would not be what the client asked for."""
    response = running.client.post(path, content=encoded(photo()))
    assert_error(response, 400, "malformed_request")
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/model?x=1", "/v2?x=1", "/v2/models/fake?x=1"])
def test_unknown_query_parameter_of_a_get_endpoint_is_400(running: ServerThread, path: str) -> None:
    """Also for endpoints without query parameters."""
    response = running.client.get(path)
    assert response.status_code == 400
    assert "this endpoint has none" in response.text


def test_query_parameter_of_infer_is_400(running: ServerThread) -> None:
    """The error body is that of the Open Inference Protocol."""
    response = running.client.post("/v2/models/fake/infer?top_k=1", content=b"{}")
    assert (response.status_code, response.json()["code"]) == (400, "malformed_request")


PROBES = ["/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/fake/ready"]


@pytest.mark.parametrize("path", [*PROBES, "/", "/page/style.css", "/docs", "/openapi.json"])
def test_probes_and_pages_ignore_query_parameters(running: ServerThread, path: str) -> None:
    """Probes and browsers add some to bypass caches."""
    assert running.client.get(f"{path}?t=1764264000").status_code == 200


@pytest.mark.parametrize("query", ["", "?", "?&", "?top_k=1"])
def test_known_and_empty_query_parameters_are_accepted(running: ServerThread, query: str) -> None:
    """An empty query string has no parameters."""
    assert running.client.post(f"/v1/predict{query}", content=encoded(photo())).status_code == 200


def test_missing_key_is_reported_before_an_unknown_query_parameter(tmp_path: object) -> None:
    """A client without a key learns nothing else."""
    path = f"{tmp_path}/keys"
    with open(path, "w") as file:
        file.write("0123456789abcdef\n")
    with ServerThread(FakeRunner(), api_key_file=path) as running:
        assert_error(running.client.get("/v1/model?x=1"), 401, "unauthorized")
        key = {"Authorization": "Bearer 0123456789abcdef"}
        assert_error(running.client.get("/v1/model?x=1", headers=key), 400, "malformed_request")
