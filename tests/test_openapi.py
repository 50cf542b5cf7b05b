"""The OpenAPI document: linted, and used by a generator whose client calls every operation of a real server."""

import base64
import importlib
import importlib.util
import io
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import assert_error
from tests.servers import ServerProcess

GENERATOR_OPTIONS = Path(__file__).with_name("openapi_client.yml")
REQUEST_HEADERS = {"RequestId", "RequestTimeoutMs"}


@pytest.fixture(scope="module")
def server(tiny_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--checkpoint", tiny_path) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    return found


def operations(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [operation for methods in document["paths"].values() for operation in methods.values()]


def test_operations_have_one_kind_of_answer_and_stable_ids(document: dict[str, Any]) -> None:
    """Generators take the first media type, and name functions by ids."""
    for operation in operations(document):
        assert len(operation["responses"]["200"].get("content", {})) <= 1 or "infer" in operation["operationId"]
    ids = {operation["operationId"] for operation in operations(document)}
    assert {"predict", "features", "features_npy", "explain", "explain_json", "embeddings", "model_infer"} < ids
    assert {"server_live", "server_ready", "server_metadata", "model_ready", "model_infer_of_version"} < ids


def test_document_describes_headers_and_no_response_that_is_never_sent(document: dict[str, Any]) -> None:
    for operation in operations(document):
        assert "HTTPValidationError" not in json.dumps(operation)
        assert all("X-Request-Id" in each["headers"] for each in operation["responses"].values())
    predict = document["paths"]["/v1/predict"]["post"]
    assert "Retry-After" in predict["responses"]["429"]["headers"]
    assert {each["$ref"].split("/")[-1] for each in predict["parameters"] if "$ref" in each} == REQUEST_HEADERS
    assert "422" not in document["paths"]["/v2/models/{name}"]["get"]["responses"]


@pytest.mark.parametrize(
    ("path", "accept", "status"),
    [
        ("/v1/predict", "application/json", 200),
        ("/v1/predict", "text/html, */*;q=0.1", 200),
        ("/v1/predict", "image/png", 406),
        ("/v1/predict", "application/json;q=0, */*", 406),
        ("/v1/predict?top_k=1", "text/html", 406),
        ("/v1/features", "application/x-npy", 200),
        ("/v1/features.npy", "*/*", 200),
        ("/v1/features.npy", "application/json", 406),
        ("/v1/explain", "image/*", 200),
        ("/v1/explain", "application/json", 200),
        ("/v1/explain", "text/html", 406),
        ("/v1/explain.json", "image/png", 406),
        ("/v1/explain.json", "*/*", 200),
    ],
)
def test_accept_header_that_cannot_be_met_is_406(server: ServerProcess, path: str, accept: str, status: int) -> None:
    response = server.client.post(path, content=encoded(photo()), headers={"Accept": accept})
    if status == 200:
        assert response.status_code == 200
    else:
        assert_error(response, 406, "not_acceptable")


def test_paths_answer_as_accept_does(server: ServerProcess) -> None:
    """`/v1/features.npy` and `/v1/explain.json` give what `Accept` gives at the paths without an ending."""
    data = encoded(photo())
    for path, accept in (("/v1/features.npy", "application/x-npy"), ("/v1/explain.json", "application/json")):
        as_before = server.client.post(path.rpartition(".")[0], content=data, headers={"Accept": accept})
        assert server.client.post(path, content=data).content == as_before.content


def test_redocly_finds_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    redocly = shutil.which("redocly")
    if redocly is None:
        pytest.skip("redocly is not installed: npm install --global @redocly/cli")
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    found = subprocess.run([redocly, "lint", path, "--format=json"], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}


@pytest.fixture(scope="module")
def client(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package that openapi-python-client makes, without a warning."""
    if importlib.util.find_spec("openapi_python_client") is None:
        pytest.skip("openapi-python-client is not installed")
    folder = tmp_path_factory.mktemp("generated")
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", path, "--meta", "none"]
    command += ["--config", GENERATOR_OPTIONS, "--output-path", folder / "rednet_client", "--fail-on-warning"]
    made = subprocess.run([str(each) for each in command], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stdout
    sys.path.insert(0, str(folder))
    yield importlib.import_module("rednet_client")
    sys.path.remove(str(folder))


def test_generated_client_calls_every_operation(server: ServerProcess, client: ModuleType) -> None:
    """Each answer is parsed into the type that the document describes."""
    models, types = (importlib.import_module(f"rednet_client.{each}") for each in ("models", "types"))
    api = importlib.import_module("rednet_client.api")
    described = server.client.get("/v1/model").json()
    data = encoded(photo())
    text = base64.b64encode(data).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    embeddings = {"model": described["name"], "input": [text]}
    bodies = {
        "model_infer": models.InferBody.from_dict({"inputs": [tensor]}),
        "embeddings": models.EmbeddingsRequestBody.from_dict(embeddings),
        "repository_index": models.RepositoryIndexRequestBody.from_dict({}),
    }
    called = {}
    with client.Client(base_url=server.url) as open_client:
        for _, name, is_package in pkgutil.walk_packages(api.__path__, "rednet_client.api."):
            if is_package:
                continue
            operation, endpoint = name.rpartition(".")[2], importlib.import_module(name)
            kind = operation.removesuffix("_of_version")
            path = [described["name"]] if kind.startswith("model_") and kind != "model_description" else []
            path += ["1"] if operation != kind else []
            arguments: dict[str, Any] = {"x_request_id": f"id-of-{operation}"}
            if kind in bodies:
                arguments["body"] = bodies[kind]
            elif kind in {"predict", "features", "features_npy", "explain", "explain_json"}:
                arguments["body"] = types.File(payload=io.BytesIO(data))
            answer = endpoint.sync_detailed(*path, client=open_client, **arguments)
            assert answer.status_code == 200, (operation, answer.content)
            assert answer.headers["x-request-id"] == f"id-of-{operation}"
            called[operation] = answer
        predict = importlib.import_module("rednet_client.api.v1.predict")
        files = [types.File(payload=io.BytesIO(data), file_name=f"{each}.png") for each in range(2)]
        form = predict.sync(client=open_client, body=models.PredictFilesBody(images=files), top_k=1)
        as_json = predict.sync(client=open_client, body=models.ImagesBody(images=[text]), top_k=1)
    assert called.keys() == {each["operationId"] for each in operations(server.client.get("/openapi.json").json())}
    assert all(answer.parsed is not None for name, answer in called.items() if name != "metrics")
    assert [len(each.classes) for each in form.predictions] == [1, 1]
    assert as_json.predictions[0].classes == form.predictions[0].classes
    assert called["explain"].parsed.payload.read(4) == b"\x89PNG"
    assert np.load(io.BytesIO(called["features_npy"].parsed.payload.read())).shape[0] == 1
