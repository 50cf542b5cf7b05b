"""API keys: the key file, and servers that require a key."""

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rednet.service.api_keys import MIN_KEY_CHARS, UNNAMED, KeyFile, KeyFileError
from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, assert_error, connected, predict
from tests.servers import REDNET, FakeRunner, ServerThread, wait_until

ONE, OTHER = "one-key-0123456789", "another/key=+0123456789"
GUARDED = ["/v1/model", "/v2", "/v2/models/fake", "/v2/models/fake/ready", "/v2/models/fake/versions/1"]
GUARDED += ["/v2/models/fake/config", "/v2/models/stats"]
OPEN = ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# for the shop\n{ONE}\n\n  {OTHER}\r\n")
    return path


@pytest.fixture
def running(key_file: Path) -> Iterator[ServerThread]:
    with ServerThread(FakeRunner(), api_key_file=key_file) as running:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_keys_of_the_file_are_valid(key_file: Path) -> None:
    """Comments, parts of keys and the empty key are invalid."""
    keys = KeyFile(key_file)
    assert (keys.name_of(ONE), keys.name_of(OTHER)) == (UNNAMED, UNNAMED)
    for wrong in ("", "# for the shop", ONE[:-1], ONE + "0", ONE.upper(), ONE + OTHER, "ключ", "\0"):
        assert keys.name_of(wrong) is None


def test_keys_of_a_file_have_names(tmp_path: Path) -> None:
    """A name may have several keys. What comes before a colon is a name only if it could be one."""
    path = tmp_path / "keys"
    path.write_text(f"shop:{ONE}\nshop: {OTHER}\nmr.x_1-b:{ONE}:more\n{ONE}2\n+/=:{ONE}\nshop:{ONE}\n")
    keys = KeyFile(path)
    assert len(keys) == 5
    assert keys.name_of(ONE) == keys.name_of(OTHER) == "shop"
    assert keys.name_of(f"{ONE}:more") == "mr.x_1-b"
    assert keys.name_of(f"{ONE}2") == keys.name_of(f"+/=:{ONE}") == UNNAMED
    assert keys.name_of(f"shop:{ONE}") is None


def test_keys_stay_if_their_file_cannot_be_read_again(tmp_path: Path) -> None:
    """A reload takes all of a file or nothing."""
    path = tmp_path / "keys"
    path.write_text(f"shop:{ONE}\n")
    keys = KeyFile(path)
    for content in ("", f"shop:{OTHER}\nshort\n"):
        path.write_text(content)
        with pytest.raises(KeyFileError):
            keys.reload()
        assert (keys.name_of(ONE), keys.name_of(OTHER)) == ("shop", None)
    path.write_text(f"bakery:{OTHER}\n")
    keys.reload()
    assert (keys.name_of(ONE), keys.name_of(OTHER)) == (None, "bakery")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no API key"),
        (b"# none yet\n\n", "contains no API key"),
        (b"0123456789abcdef\nsecretsecret\n", f"line 2: an API key must have at least {MIN_KEY_CHARS} characters"),
        (b"secret secret secret\n", "line 1: an API key must consist of printable ASCII"),
        (b"secretsecretsecret\xff\n", "line 1: an API key must consist of printable ASCII"),
        (b"shop:secretsecret\n", f"line 1: an API key must have at least {MIN_KEY_CHARS} characters"),
        (
            b"shop:secretsecretsecret\nbakery:secretsecretsecret\n",
            "line 2: another line has this API key",
        ),
    ],
)
def test_invalid_key_file_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    """The message names the line, and never its contents."""
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=message) as caught:
        KeyFile(path)
    assert "secretsecret" not in str(caught.value)


def test_server_with_a_missing_key_file_does_not_start(tmp_path: Path) -> None:
    """It prints one line and exits with status 2 instead of serving without authentication."""
    command = (REDNET, "serve", "--api-key-file", tmp_path / "no")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot be read: No such file" in ended.stderr


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer(ONE[:-1]),
        bearer(f"{ONE} {ONE}"),
        {"Authorization": ONE},
        {"Authorization": "Basic " + base64.b64encode(f"user:{ONE}".encode()).decode()},
    ],
)
def test_all_endpoints_except_health_are_401_without_a_key(running: ServerThread, headers: dict[str, str]) -> None:
    """In both protocols, with the header `WWW-Authenticate`."""
    response = predict(running.client, encoded(photo()), **headers)
    assert_error(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == 'Bearer realm="rednet"'
    assert_error(running.client.post("/v1/features", headers=headers), 401, "unauthorized")
    assert_error(running.client.post("/v1/explain?layer=none", headers=headers), 401, "unauthorized")
    for path in GUARDED:
        assert running.client.get(path, headers=headers).status_code == 401
    answer = running.client.post("/v2/models/fake/infer", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert isinstance(answer.json()["error"], str)
    for path in OPEN:
        assert running.client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("key", [ONE, OTHER])
def test_all_endpoints_are_served_with_a_key(running: ServerThread, key: str) -> None:
    """Any key of the file works, and the scheme is case-insensitive."""
    assert predict(running.client, encoded(photo()), **bearer(key)).status_code == 200
    for path in (*GUARDED, *OPEN):
        assert running.client.get(path, headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_requests_are_counted_by_the_name_of_their_key(tmp_path: Path) -> None:
    """Once each, whatever the endpoint. Requests without a valid key are not counted."""
    path = tmp_path / "keys"
    path.write_text(f"shop:{ONE}\n{OTHER}\n")
    with ServerThread(FakeRunner(), api_key_file=path) as running:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        for url in (PREDICT, f"{PREDICT}?top_k=1", f"{PREDICT}?top=1", "/v1/features", "/v1/explain"):
            running.client.post(url, content=encoded(photo()), headers=bearer(ONE) | {"Content-Type": "image/png"})
        running.client.get("/v1/model", headers=bearer(OTHER))
        running.client.get("/v1/model", headers=bearer(OTHER + "0"))
        text = running.client.get("/metrics").text
    counts = [line for line in text.splitlines() if line.startswith("rednet_requests_by_key_total")]
    assert sorted(counts) == [
        'rednet_requests_by_key_total{key="shop"} 5.0',
        f'rednet_requests_by_key_total{{key="{UNNAMED}"}} 1.0',
    ]


def test_message_tells_a_wrong_key_from_a_missing_one(running: ServerThread) -> None:
    for headers, message in ({}, "requires an API key"), (bearer(f"shop:{ONE}"), "the API key is not valid"):
        assert message in running.client.get("/v1/model", headers=headers).json()["error"]["message"]


def test_unauthorized_body_is_not_read(running: ServerThread) -> None:
    """The response comes before the announced body, and the request takes no slot in the queue."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with connected(running.url, head.encode()) as connection:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 401")
        assert running.engine_client.requests == running.engine_client.queue_depth == 0


def test_metrics_need_a_key_only_if_configured(running: ServerThread, key_file: Path) -> None:
    """With `--metrics-access key`."""
    assert running.client.get("/metrics").status_code == 200
    with ServerThread(FakeRunner(), api_key_file=key_file, metrics_access="key") as closed:
        assert_error(closed.client.get("/metrics"), 401, "unauthorized")
        assert closed.client.get("/metrics", headers=bearer(ONE)).status_code == 200


def test_openapi_describes_which_endpoints_need_a_key(running: ServerThread) -> None:
    """`/docs` can then ask for the key. A server without keys describes it as optional."""

    def guarded(client: httpx.Client) -> set[str]:
        paths = client.get("/openapi.json").json()["paths"]
        return {path for path, operations in paths.items() for each in operations.values() if each["security"]}

    paths = guarded(running.client)
    assert {PREDICT, "/v1/features", "/v1/explain", "/v1/model", "/v2", "/v2/models/{name}/infer"} <= paths
    assert {"/v1/embeddings", "/v2/repository/index"} <= paths
    assert not paths & {*OPEN, "/metrics"}
    with ServerThread(FakeRunner()) as without:
        assert guarded(without.client) == paths
        document = without.client.get("/openapi.json").json()
        assert document["paths"][PREDICT]["post"]["security"] == [{"HTTPBearer": []}, {}]
    assert running.client.get("/openapi.json").json()["paths"][PREDICT]["post"]["security"] == [{"HTTPBearer": []}]
