"""The log of a server, as text and as JSON."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from rednet.service.observability import log
from tests.conftest import encoded, photo
from tests.http_helpers import TEXT, predict
from tests.servers import REDNET, ServerProcess, is_ready, listens_at, wait_until

KEY, STRANGE = "the-key-0123456789", "strange-0123456789"


@pytest.fixture(scope="module", params=["text", "json"])
def running(request: pytest.FixtureRequest, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that requires a key, and the format of its log."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"shop:{KEY}")
    options = ("--checkpoint", tiny_path, "--api-key-file", path, "--log-format", request.param)
    with ServerProcess(*options) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server, request.param


def line(server: ServerProcess, request_id: str) -> str:
    """The access log line of a request."""
    wait_until(lambda: request_id in server.log, "the request's line")
    (found,) = [each for each in server.log.splitlines() if request_id in each]
    return found


def fields(found: str, log_format: str) -> dict[str, str]:
    """The fields of a line, as text for both formats."""
    if log_format == "json":
        return {name: str(value) for name, value in json.loads(found).items()}
    return dict(part.split("=", 1) for part in found.split() if "=" in part)


def test_access_log_has_one_line_per_request_with_stage_durations(running: tuple[ServerProcess, str]) -> None:
    """Endpoint, status, number of images, duration of each stage, and batch size, by request id."""
    server, log_format = running
    files = [("f", ("a.png", encoded(photo(1)))), ("f", ("b.png", TEXT))]
    assert server.client.post("/v1/predict", files=files, headers={"X-Request-Id": "id-of-two"}).status_code == 200
    said = fields(line(server, "id-of-two"), log_format)
    assert (said["method"], said["endpoint"], said["status"], said["images"]) == ("POST", "/v1/predict", "200", "2")
    assert said["batch_size"] == "1"
    stages = [float(said[f"{stage}_ms"]) for stage in ("decode", "queue", "inference")]
    assert 0 < sum(stages) <= float(said["duration_ms"])


def test_access_log_of_a_failed_request_has_known_fields_only(running: tuple[ServerProcess, str]) -> None:
    """Unknown fields are absent, and no value of an earlier request is left over."""
    server, log_format = running
    assert predict(server.client, TEXT, **{"X-Request-Id": "id-of-text"}).status_code == 415
    said = fields(line(server, "id-of-text"), log_format)
    assert (said["status"], said["error"], said["images"]) == ("415", "unsupported_media_type", "1")
    assert "batch_size" not in said
    assert server.client.get("/v3", headers={"X-Request-Id": "id-of-nothing"}).status_code == 404
    said = fields(line(server, "id-of-nothing"), log_format)
    assert (said["endpoint"], said["status"]) == ("unmatched", "404")
    assert "images" not in said


def test_access_log_names_api_keys(running: tuple[ServerProcess, str]) -> None:
    """The keys themselves are never logged, neither valid nor invalid ones."""
    server, log_format = running
    for query in ("", "?top_k=1"):
        headers = {"X-Request-Id": f"id-of-shop{query}"}
        assert server.client.post(f"/v1/predict{query}", content=encoded(photo()), headers=headers).status_code == 200
        assert fields(line(server, f"id-of-shop{query}"), log_format)["key"] == "shop"
    headers = {"Authorization": f"Bearer {STRANGE}", "X-Request-Id": "id-of-stranger"}
    assert predict(server.client, encoded(photo()), **headers).status_code == 401
    said = fields(line(server, "id-of-stranger"), log_format)
    assert said["status"] == "401"
    assert "key" not in said
    assert "0123456789" not in server.log


def test_access_log_says_who_asked_and_how_many_bytes(running: tuple[ServerProcess, str]) -> None:
    """The client's address, its user agent, and the sizes of both bodies. Nobody is trusted to name another client."""
    server, log_format = running
    content = encoded(photo())
    headers = {"X-Request-Id": "id-of-sizes", "User-Agent": "shop/1.0", "X-Forwarded-For": "203.0.113.9"}
    response = server.client.post("/v1/predict", content=content, headers=headers)
    said = fields(line(server, "id-of-sizes"), log_format)
    assert (said["client"], said["user_agent"]) == ("127.0.0.1", "shop/1.0")
    assert (int(said["bytes_in"]), int(said["bytes_out"])) == (len(content), len(response.content))
    server.client.head("/v1/model", headers={"X-Request-Id": "id-of-head"})
    said = fields(line(server, "id-of-head"), log_format)
    assert (said["method"], said["bytes_in"], said["bytes_out"]) == ("HEAD", "0", "0")


def test_access_log_escapes_and_shortens_the_user_agent(running: tuple[ServerProcess, str]) -> None:
    """Neither a terminal that shows the log nor its size is in the client's hands."""
    server, _ = running
    headers = [(b"X-Request-Id", b"id-of-escapes"), (b"User-Agent", b"caf\xc3\xa9 \xc2\x9b31m" + b"x" * 5_000)]
    assert server.client.get("/v1/model", headers=headers).status_code == 200
    found = line(server, "id-of-escapes")
    assert "xc3" in found
    assert found.isascii()
    assert len(found) < 700


def test_documentation_has_endpoints_of_its_own(running: tuple[ServerProcess, str]) -> None:
    """In the log and in metrics."""
    server, log_format = running
    for path in ("/docs", "/openapi.json"):
        assert server.client.get(path, headers={"X-Request-Id": f"id-of{path}"}).status_code == 200
        assert fields(line(server, f"id-of{path}"), log_format)["endpoint"] == path
        assert f'count{{endpoint="{path}",status="200"}} 1.0' in server.client.get("/metrics").text


def test_client_of_a_trusted_proxy_is_logged(tiny_path: Path) -> None:
    """X-Forwarded-For counts from right to left: what is left of the first untrusted address may be made up."""
    options = ("--checkpoint", tiny_path, "--frontends", 2, "--forwarded-allow-ips", "127.0.0.0/8, 198.51.100.7")
    with ServerProcess(*options) as server:

        def logged(forwarded: str, request_id: str) -> str:
            headers = [(b"X-Forwarded-For", forwarded.encode("latin-1")), (b"X-Request-Id", request_id.encode())]
            server.client.get("/v1/model", headers=headers)
            return fields(line(server, request_id), "text")["client"]

        assert logged("203.0.113.9", "id-of-one") == "203.0.113.9"
        assert logged("192.0.2.1, 203.0.113.9, 198.51.100.7, 127.0.0.3", "id-of-chain") == "203.0.113.9"
        assert logged("2001:db8::1", "id-of-ipv6") == "2001:db8::1"
        assert logged("\xc2\x9b" * 1_000, "id-of-odd").startswith(r"\xc2\x9b")
        assert len(line(server, "id-of-odd")) < 1_300


def test_mapped_ipv4_address_of_a_proxy_is_trusted(tiny_path: Path) -> None:
    """On a socket for both IPv6 and IPv4, the kernel writes IPv4 addresses as IPv6."""
    options = ("--checkpoint", tiny_path, "--host", "::", "--forwarded-allow-ips", "127.0.0.1")
    with ServerProcess(*options, ready=False) as server:
        server.client.base_url = server.url.replace("[::]", "127.0.0.1").replace("[::1]", "127.0.0.1")
        wait_until(lambda: is_ready(server.client), "readiness")
        headers = {"X-Forwarded-For": "203.0.113.9", "X-Request-Id": "id-of-mapped"}
        server.client.get("/v1/model", headers=headers)
        assert fields(line(server, "id-of-mapped"), "text")["client"] == "203.0.113.9"
        server.client.get("/v1/model", headers={"X-Request-Id": "id-of-peer"})
        assert fields(line(server, "id-of-peer"), "text")["client"] == "127.0.0.1"


def test_unix_socket_has_no_client_address(tiny_path: Path, tmp_path: Path) -> None:
    path, logged = tmp_path / "rednet.sock", tmp_path / "log"
    command = [REDNET, "serve", "--uds", path, "--checkpoint", tiny_path, "--decoders", "1"]
    with logged.open("w") as file, subprocess.Popen([str(part) for part in command], stderr=file) as process:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
                wait_until(lambda: listens_at(path), "the socket")
                wait_until(lambda: is_ready(client), "the server")
                client.get("/v1/model", headers={"X-Request-Id": "id-of-local", "X-Forwarded-For": "203.0.113.9"})
            wait_until(lambda: "id-of-local" in logged.read_text(), "the request's line")
        finally:
            process.terminate()
    (found,) = [each for each in logged.read_text().splitlines() if "id-of-local" in each]
    assert "user_agent=python-httpx" in found
    assert "client=" not in found


def test_probes_are_not_logged_at_info_level(running: tuple[ServerProcess, str]) -> None:
    """They arrive every few seconds; --log-level debug logs them."""
    server, _ = running
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert server.client.get(path, headers={"X-Request-Id": "id-of-probe"}).status_code == 200
    predict(server.client, encoded(photo()), **{"X-Request-Id": "id-after-probes"})
    line(server, "id-after-probes")
    assert "id-of-probe" not in server.log


def test_log_lines_of_libraries_have_the_same_format(running: tuple[ServerProcess, str]) -> None:
    """Time, level, logger and event."""
    server, log_format = running
    lines = server.log.splitlines()
    if log_format == "json":
        events = [json.loads(each) for each in lines]
        assert all(event.keys() >= {"timestamp", "level", "logger", "event"} for event in events)
        assert any(event["logger"].startswith("uvicorn") for event in events)
    else:
        assert all(re.match(r"20\S+ \[(info|warning) *\] ", each) for each in lines)


@pytest.mark.parametrize("value", ["plain", "a b", "a=b", 'quote"', "it's", "", "tab\t", "line\n", 1, 0.25, None])
def test_access_log_line_equals_structlogs(value: object) -> None:
    """The access log has a renderer of its own, which is faster."""
    event = {"logger": "name", "event": "request", "timestamp": "2026-11-25T12:11:58Z", "level": "info", "x": value}
    assert log.access_text(None, "info", dict(event)) == log.CONSOLE(None, "info", dict(event))


def test_server_answers_when_the_log_pipe_is_closed(tiny_path: Path) -> None:
    """As when the program that reads standard error has ended: connections stay open, and the server stops on
    SIGTERM."""
    command = [str(REDNET), "serve", "--port", "0", "--checkpoint", str(tiny_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = next(found[1] for each in process.stderr if (found := re.search(r"running on http://\S+:(\d+)", each)))
        process.stderr.close()
        with closing(HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
            wait_until(lambda: asked(connection, "/readyz") == 200, "readiness")
            for _ in range(3):
                assert asked(connection, "/v1/model") == 200
        process.terminate()
        assert process.wait(60) == 0


def asked(connection: HTTPConnection, path: str) -> int:
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status
