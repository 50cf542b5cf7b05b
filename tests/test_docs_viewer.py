"""The documentation at /docs: in a real browser, without any other host."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.http_helpers import assert_error
from tests.servers import FakeRunner, ServerThread

CHROMIUM = shutil.which("chromium")
needs_viewer = pytest.mark.skipif(find_spec("fastapi_swagger") is None, reason="fastapi-swagger is not installed")


def test_documentation_can_be_switched_off() -> None:
    """The viewer and the document."""
    with ServerThread(FakeRunner(), docs="off") as running:
        for path in ("/docs", "/docs/", "/docs/start.js", "/redoc", "/openapi.json"):
            assert_error(running.client.get(path), 404, "not_found")


@needs_viewer
def test_viewer_has_the_policy_of_the_page_and_is_revalidated() -> None:
    """It differs only in images: Swagger UI's are data URLs."""
    with ServerThread(FakeRunner()) as running:
        page, viewer = running.client.get("/"), running.client.get("/docs")
        policy = page.headers["content-security-policy"]
        assert viewer.headers["content-security-policy"] == policy.replace("blob:", "blob: data:")
        for path in ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
            first = running.client.get(path)
            assert first.status_code == 200
            assert first.headers.get_list("x-content-type-options") == ["nosniff"]
            again = running.client.get(path, headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert_error(running.client.get("/docs/index.py"), 404, "not_found")


class Prefixed(BaseHTTPRequestHandler):
    """A proxy that adds the prefix /rednet, as nginx's `location /rednet/ { proxy_pass http://server/; }`."""

    server_url = ""

    def do_GET(self) -> None:
        if not self.path.startswith("/rednet/"):
            self.send_error(404)
            return
        answer = httpx.get(self.server_url + self.path.removeprefix("/rednet"))
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name not in {"content-length", "transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@needs_viewer
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: it comes from Debian")
def test_viewer_works_offline_behind_a_prefix_and_tries_requests() -> None:
    """No request leaves, the console stays silent, and "Execute" shows the server's answer."""
    with ServerThread(FakeRunner()) as running:
        handler = type("Handler", (Prefixed,), {"server_url": running.url})
        proxy = HTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{proxy.server_port}/rednet"
        troubles: list[str] = []
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=CHROMIUM, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
                )
                page = browser.new_page()
                page.set_default_timeout(30_000)

                def requested(address: str) -> None:
                    if not address.startswith((f"{url}/", "data:", "blob:")):
                        troubles.append(f"a request to {address}")

                page.on("request", lambda request: requested(request.url))
                page.on("pageerror", lambda error: troubles.append(str(error)))
                page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
                page.goto(f"{url}/docs")
                expect(page.locator(".opblock").first).to_be_visible()
                assert page.locator(".opblock").count() >= 12
                operation = page.locator(".opblock", has=page.locator('[data-path="/v1/model"]'))
                operation.locator(".opblock-summary-control").click()
                operation.get_by_role("button", name="Execute").click()
                live = operation.locator(".live-responses-table")
                expect(live.locator("tbody td.response-col_status").first).to_contain_text("200")
                expect(live).to_contain_text("feature_channels")
                browser.close()
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()
        assert troubles == []
