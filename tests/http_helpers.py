"""How tests ask a server, and what they look for in its answers."""

import socket
from concurrent.futures import Executor, Future
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import encoded, photo
from tests.servers import PATIENCE_S, FakeRunner, ServerThread

PREDICT = "/v1/predict"
PNG = {"Content-Type": "image/png"}
TEXT = b"certainly no image"
CUT = encoded(photo())[:500]


def connected(url: str, sent: bytes, buffer: int | None = None) -> socket.socket:
    """A connection over which these bytes went. The system holds about `buffer` bytes of what comes; None: many."""
    parts = urlsplit(url)
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(PATIENCE_S)
    connection.connect((parts.hostname, parts.port))
    connection.sendall(sent)
    return connection


def predict(client: httpx.Client, data: bytes, **headers: str) -> httpx.Response:
    return client.post(PREDICT, content=data, headers=PNG | headers)


def sample(client: httpx.Client, series: str, **labels: str) -> float:
    """The value of one series of `/metrics`, 0 where there is none."""
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for each in family.samples:
            if each.name == series and labels.items() <= each.labels.items():
                return float(each.value)
    return 0.0


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert response.json()["error"]["message"]
    assert response.headers["x-request-id"]


def classes(response: httpx.Response, index: int = 0) -> list[dict[str, float]]:
    found: list[dict[str, float]] = response.json()["predictions"][index]["classes"]
    return found


def occupy(running: ServerThread, runner: FakeRunner, pool: Executor) -> Future[httpx.Response]:
    """Send an image that the device works on until `runner.go_on` is set; what comes meanwhile has to wait."""
    runner.go_on.clear()
    held = pool.submit(predict, running.client, encoded(photo()))
    assert runner.running.wait(PATIENCE_S)
    return held
