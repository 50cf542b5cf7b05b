"""Request heads against RFC 9112 and the server's limits, over raw connections."""

import json
import re
from collections.abc import Iterator

import pytest

from rednet.service.http.request_head import MAX_HEADER_BYTES, MAX_HEADERS, MAX_TARGET_BYTES
from tests.conftest import encoded, photo
from tests.http_helpers import connected
from tests.servers import FakeRunner, ServerThread

CHUNKED = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def running() -> Iterator[ServerThread]:
    with ServerThread(FakeRunner()) as server:
        yield server


def exchange(server: ServerThread, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes after which the server must close, and return status, headers and body of the response."""
    received = b""
    with connected(server.url, sent) as connection:
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    return int(lines[0].split(" ")[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def get(path: bytes = b"/livez", headers: bytes = b"Host: x\r\n", method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nConnection: close\r\n" + headers + b"\r\n"


def post(headers: bytes, body: bytes) -> bytes:
    headers += b"Host: x\r\nConnection: close\r\n"
    return b"POST /v1/predict HTTP/1.1\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


MALFORMED = {
    "host missing": get(headers=b""),
    "host twice": get(headers=b"Host: x\r\nHost: y\r\n"),
    "host with a space": get(headers=b"Host: x y\r\n"),
    "http 0.9": b"GET /livez\r\n\r\n",
    "http 2.0": b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
    "length twice": post(b"Content-Length: 1\r\n", b"x"),
    "length with a sign": CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: +1") + b"x",
    "length and chunked": post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "another transfer coding": CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n",
    "chunked in http 1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "chunk size in hexadecimal notation": CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"1\r\nxyz\r\n0\r\n\r\n",
    "folded header": get(headers=b"Host: x\r\nX-A: b\r\n c\r\n"),
    "space before the colon": get(headers=b"Host : x\r\n"),
    "bare line feeds": get().replace(b"\r\n", b"\n"),
    "bare carriage return": get(headers=b"Host: x\r\nX-A: b\rc\r\n"),
    "nul in a header": get(headers=b"Host: x\r\nX-A: b\0c\r\n"),
    "nul in a path": get(b"/live\0z"),
    "relative path": get(b"livez"),
    "two content types": post(b"Content-Type: image/png\r\nContent-Type: application/json\r\n", b"x"),
    "two authorizations": get(headers=b"Host: x\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
    "two request ids": get(headers=b"Host: x\r\nX-Request-Id: a\r\nX-Request-Id: b\r\n"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_head_is_400(running: ServerThread, name: str) -> None:
    """The response has the usual error body."""
    status, headers, body = exchange(running, MALFORMED[name])
    assert (status, json.loads(body)["error"]["code"]) == (400, "malformed_request")
    assert headers["connection"] == "close"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (get(b"http://other.example/livez?x=1"), 200),
        (get(b"http://other.example"), 200),
        (get(headers=b"Host: [::1]:8000\r\n"), 200),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"\r\n" + get(), 200),
        (get(b"*", method=b"OPTIONS"), 404),
        (get(b"/livez%00"), 404),
        (get(b"//livez"), 404),
    ],
)
def test_valid_head_is_routed(running: ServerThread, sent: bytes, expected: int) -> None:
    """Absolute targets, HTTP/1.0 without Host, and unusual paths."""
    assert exchange(running, sent)[0] == expected


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t  "])
def test_whitespace_around_a_header_value_is_ignored(running: ServerThread, space: bytes) -> None:
    """As RFC 9112, section 5.1, requires."""
    timeout = b"X-Request-Timeout-Ms: 5000" + space + b"\r\n"
    assert exchange(running, post(timeout, encoded(photo())))[0] == 200
    assert exchange(running, post(timeout.replace(b"5000", b"5x"), encoded(photo())))[0] == 400


def test_expect_continue_with_trailing_space_gets_100(running: ServerThread) -> None:
    """Only in HTTP/1.1, because HTTP/1.0 has no interim responses."""
    sent = post(b"Expect: 100-Continue \r\n", b"x")
    assert exchange(running, sent)[0] == 100
    assert exchange(running, sent.replace(b"HTTP/1.1", b"HTTP/1.0"))[0] == 415


def test_trailers_are_not_headers(running: ServerThread) -> None:
    """A deadline or a request id in a trailer has no effect."""
    body = encoded(photo())
    trailers = b"X-Request-Timeout-Ms: 0\r\nX-Request-Id: from-a-trailer\r\n"
    status, headers, _ = exchange(running, CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(body), body) + trailers + b"\r\n")
    assert status == 200
    assert headers["x-request-id"] != "from-a-trailer"


def test_key_in_a_trailer_is_ignored(tmp_path: object) -> None:
    """API keys are read from headers only."""
    path = f"{tmp_path}/keys"
    with open(path, "w") as file:
        file.write("0123456789abcdef\n")
    with ServerThread(FakeRunner(), api_key_file=path) as running:
        trailer = b"0\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n"
        assert exchange(running, CHUNKED + b"1\r\nx\r\n" + trailer)[0] == 401


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (get(headers=b"Host: x\r\nAccept: " + b"," * MAX_HEADER_BYTES + b"\r\n"), 431, "headers_too_large"),
        (post(b"Content-Type: a" + b";" * 60_000 + b"\r\n", b"x"), 431, "headers_too_large"),
        (get(headers=b"Host: x\r\n" + b"a:\r\n" * MAX_HEADERS), 431, "headers_too_large"),
        (get(headers=b"Host: x\r\n" + (b"a: " + b"b" * 8_000 + b"\r\n") * 9), 431, "headers_too_large"),
        (get(b"/" * (MAX_TARGET_BYTES + 1)), 414, "uri_too_long"),
        (get(b"/livez?" + b"&a" * 200), 414, "uri_too_long"),
    ],
)
def test_oversized_head_is_rejected(running: ServerThread, sent: bytes, status: int, code: str) -> None:
    """Each part of a head has a limit, because heads are parsed in the event loop."""
    answered, _, body = exchange(running, sent)
    assert (answered, json.loads(body)["error"]["code"]) == (status, code)


def test_largest_allowed_header_is_served(running: ServerThread) -> None:
    """A header of exactly the maximum size has no effect."""
    value = b"b" * (MAX_HEADER_BYTES - 1)
    assert exchange(running, get(headers=b"Host: x\r\na: " + value + b"\r\n"))[0] == 200
    assert exchange(running, get(headers=b"Host: x\r\n" + b"a:\r\n" * (MAX_HEADERS - 2)))[0] == 200


GETS = ["/livez", "/readyz", "/metrics", "/v1/model", "/v2", "/v2/models/fake", "/v2/models/fake/ready"]
GETS += ["/v2/health/live", "/v2/health/ready", "/", "/page/style.css", "/docs", "/openapi.json"]


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_head_is_get_without_a_body(running: ServerThread, path: str, connection: str) -> None:
    """Status and headers are the same, whether or not the connection closes afterwards."""
    reference = running.client.get(path)
    request = f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n"
    if connection == "keep-alive":  # the next response must follow directly
        request += "HEAD /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    status, headers, body = exchange(running, request.encode())
    assert status == reference.status_code == 200
    assert headers["content-type"] == reference.headers["content-type"].lower()
    assert path == "/metrics" or headers["content-length"] == str(len(reference.content))
    assert (body == b"") if connection == "close" else body.startswith(b"HTTP/1.1 200 ")


def test_head_of_a_post_endpoint_is_405(running: ServerThread) -> None:
    """HEAD is supported exactly where GET is, and `Allow` lists both."""
    response = running.client.head("/v1/predict")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert running.client.delete("/livez").headers["allow"] == "GET, HEAD"


def test_trailing_slash_is_served_without_a_redirect(running: ServerThread) -> None:
    """A redirect would name the wrong scheme behind a TLS proxy, and clients would send the photo twice."""
    assert running.client.get("/v1/model/").json() == running.client.get("/v1/model").json()
    posted = running.client.post("/v1/predict/?top_k=1", content=encoded(photo()))
    assert posted.status_code == 200
    assert len(posted.json()["predictions"][0]["classes"]) == 1
    assert running.client.get("/metrics/").status_code == 404


def test_documentation_links_are_relative(running: ServerThread) -> None:
    """A proxy may add a path prefix that the server does not know."""
    text = running.client.get("/docs").text + running.client.get("/docs/start.js").text
    assert '"openapi.json"' in text
    for link in re.findall(r'(?:href|src)="([^"]*)"', text):
        assert link.startswith("docs/")
    assert running.client.get("/redoc").headers["location"] == "docs"
    assert running.client.get("/docs/").headers["location"] == "../docs"
    document = running.client.get("/openapi.json").json()
    assert document["servers"] == [{"url": "."}]
    operations = [each for path in document["paths"].values() for each in path.items()]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(ids) == len(set(ids))
    assert {method for method, _ in operations} == {"get", "post"}


@pytest.mark.parametrize(
    "sent",
    [get(), get(b"/v1/model"), get(b"/v1/nothing"), get(b"/metrics"), post(b"", b"x"), get(headers=b"")],
)
def test_every_response_forbids_sniffing_and_caching(running: ServerThread, sent: bytes) -> None:
    """Predictions, errors, and responses to invalid HTTP."""
    _, headers, _ = exchange(running, sent)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_page_files_are_cacheable_with_revalidation_by_etag(running: ServerThread) -> None:
    """Browsers revalidate them each time, which is cheap."""
    for path in ("/", "/page/style.css"):
        response = running.client.get(path)
        assert response.headers.get_list("cache-control") == ["no-cache"]
        assert response.headers.get_list("x-content-type-options") == ["nosniff"]
        again = running.client.get(path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
