"""Pages of other origins, and names that point to the server without its consent."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from playwright.sync_api import sync_playwright

from rednet.service.settings import SettingsError, read_settings
from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, TEXT, assert_error, predict
from tests.servers import FakeRunner, ServerThread

CHROMIUM = shutil.which("chromium")
KEY = "correct-horse-battery"
APP = "https://app.example"
PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "POST"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEY)
    return path


@pytest.fixture(scope="module")
def running(key_file: Path) -> Iterator[ServerThread]:
    with ServerThread(FakeRunner(), allow_origins=f"{APP}, http://localhost:3000", api_key_file=key_file) as server:
        yield server


def test_preflight_is_answered_without_a_key(running: ServerThread) -> None:
    """Browsers send none with it."""
    asked = PREFLIGHT | {"Access-Control-Request-Headers": "authorization,content-type,x-request-timeout-ms"}
    response = running.client.options(PREDICT, headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == APP
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert response.headers["x-content-type-options"] == "nosniff"
    refused = running.client.options(PREDICT, headers=PREFLIGHT | {"Origin": "https://evil.example"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_allowed_origin_may_read_answers_errors_and_headers(running: ServerThread) -> None:
    """Errors as well: a page should show why."""
    key = {"Authorization": f"Bearer {KEY}"}
    for response, status in (
        (predict(running.client, encoded(photo()), Origin=APP, **key), 200),
        (predict(running.client, TEXT, Origin=APP, **key), 415),
        (predict(running.client, TEXT, Origin=APP), 401),
    ):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == APP
        assert "Origin" in response.headers["vary"]
        exposed = set(response.headers["access-control-expose-headers"].split(", "))
        assert {"Retry-After", "X-Request-Id", "Server-Timing"} <= exposed
        assert "access-control-allow-credentials" not in response.headers
    other = predict(running.client, encoded(photo()), Origin="https://evil.example", **key)
    assert "access-control-allow-origin" not in other.headers


def test_unhandled_exception_is_readable_by_allowed_origins() -> None:
    """The middleware for origins is outside the one that answers 500."""
    with ServerThread(FakeRunner(), allow_origins="*") as running:

        async def fail() -> None:
            raise RuntimeError

        running.app.router.routes.insert(0, APIRoute("/fail", fail))
        response = running.client.get("/fail", headers={"Origin": APP})
        assert_error(response, 500, "internal")
        assert response.headers["access-control-allow-origin"] == "*"


def test_no_origin_is_allowed_by_default() -> None:
    """And there is no middleware for it."""
    with ServerThread(FakeRunner()) as running:
        names = [each.cls.__name__ for each in running.app.user_middleware]  # type: ignore[attr-defined]
        assert names == ["RequestContextMiddleware", "DirectRoutesMiddleware"]
        assert running.client.options(PREDICT, headers=PREFLIGHT).status_code == 405
        assert "access-control-allow-origin" not in predict(running.client, TEXT, Origin=APP).headers


def test_other_hosts_are_refused_except_by_probes() -> None:
    """Kubelet names the address of the pod."""
    with ServerThread(FakeRunner(), allowed_hosts="api.example, *.internal.example,127.0.0.1") as running:
        for host in ("api.example", "API.example:8000", "a.internal.example", "127.0.0.1:1"):
            assert predict(running.client, encoded(photo()), Host=host).status_code == 200
        for host in (
            "evil.example",
            "api.example.evil.example",
            "internal.example",
            "x api.example",
            "www.api.example",
        ):
            assert_error(predict(running.client, encoded(photo()), Host=host), 400, "malformed_request")
        for path in ("/", "/docs", "/openapi.json", "/nothing"):
            assert_error(running.client.get(path, headers={"Host": "evil.example"}), 400, "malformed_request")
        refused = running.client.get("/v2", headers={"Host": "evil.example"})
        assert (refused.status_code, refused.json()["code"]) == (400, "malformed_request")
        for path in ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"):
            assert running.client.get(path, headers={"Host": "10.0.0.7:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allow_origins", "app.example"),
        ("allow_origins", "https://app.example/"),
        ("allow_origins", "https://App.example"),
        ("allow_origins", "https://*.example"),
        ("allow_origins", ""),
        ("allowed_hosts", "https://api.example"),
        ("allowed_hosts", "api.example:8000"),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "a.*.example"),
        ("allowed_hosts", ""),
        ("forwarded_allow_ips", "proxy.example"),
        ("forwarded_allow_ips", "10.0.0.1/8"),
        ("forwarded_allow_ips", "10.0.0.1, *"),
        ("forwarded_allow_ips", ""),
    ],
)
def test_origin_or_host_that_can_never_match_is_an_error(name: str, value: str) -> None:
    """Rather than a server that refuses everything."""
    with pytest.raises(SettingsError, match=name.replace("_", "-")):
        read_settings({name: value}, {})


def test_every_route_with_get_has_head(running: ServerThread) -> None:
    """With the same status, whatever the path."""
    paths = {"{name}": "fake", "{version}": "1", "{path:path}": "style.css", "{path}": "start.js"}
    found = 0
    for route in iter_route_contexts(running.app.routes):
        if "GET" not in (route.methods or ()):
            continue
        path = route.path or ""
        for name, value in paths.items():
            path = path.replace(name, value)
        key = {"Authorization": f"Bearer {KEY}"}
        get, head = (running.client.request(method, path, headers=key) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert get.status_code in ({400} if "sharedmemory" in path else {200, 307})  # which is not supported
        assert head.headers["x-content-type-options"] == "nosniff"
        found += 1
    assert found >= 14


class Elsewhere(BaseHTTPRequestHandler):
    """An empty page of another origin."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ASK = """async ([url, key, photo]) => {
  const response = await fetch(url, {
    method: "POST",
    body: new Uint8Array(photo),
    headers: {"Content-Type": "image/png", Authorization: `Bearer ${key}`},
  }).catch(error => null);
  if (!response) return null;
  const names = ["X-Request-Id", "Server-Timing"];
  return [response.status, await response.text(), ...names.map(name => response.headers.get(name))];
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: it comes from Debian")
def test_page_of_another_origin_posts_a_photo_in_chromium(key_file: Path) -> None:
    """It reads answer and headers with its origin allowed, and nothing without."""
    elsewhere = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=elsewhere.serve_forever)
    thread.start()
    origin = f"http://127.0.0.1:{elsewhere.server_port}"
    try:
        with (
            sync_playwright() as playwright,
            ServerThread(FakeRunner(), allow_origins=origin, api_key_file=key_file) as allowing,
            ServerThread(FakeRunner(), api_key_file=key_file) as closed,
        ):
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
            page = browser.new_page()
            page.goto(origin)
            data = list(encoded(photo()))
            status, text, request_id, timing = page.evaluate(ASK, [allowing.url + PREDICT, KEY, data])
            assert status == 200
            assert json.loads(text)["predictions"][0]["classes"]
            assert request_id
            assert "inference" in timing
            assert page.evaluate(ASK, [closed.url + PREDICT, KEY, data]) is None
            browser.close()
    finally:
        elsewhere.shutdown()
        thread.join()
        elsewhere.server_close()
