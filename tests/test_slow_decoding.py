"""A small request that takes minutes to decode, on a real server."""

import base64
import io
import json

from PIL import Image

from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, connected, predict, sample
from tests.servers import FakeRunner, ServerThread, wait_until


def slow_request(images: int) -> bytes:
    """Large images of a few kilobytes, each of which takes a second, with a deadline of an hour."""
    content = io.BytesIO()
    Image.new("RGBA", (6000, 4000)).save(content, "PNG")
    body = json.dumps({"images": [base64.b64encode(content.getvalue()).decode()] * images}).encode()
    head = (
        f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"X-Request-Timeout-Ms: 3600000\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def test_slow_request_neither_delays_nor_rejects_others() -> None:
    """Its waiting images hold no slots in the queue. When the client disconnects, nothing is left."""
    with ServerThread(FakeRunner(), max_queue=64) as running:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        with connected(running.url, slow_request(60)):
            wait_until(lambda: sample(running.client, "rednet_inflight_requests") == 2, "the request")
            for seed in range(20):
                response = predict(running.client, encoded(photo(seed)), **{"X-Request-Timeout-Ms": "10000"})
                assert response.status_code == 200, response.text
            wait_until(lambda: sample(running.client, "rednet_queue_depth") == 0, "its images to be set aside")
            assert sample(running.client, "rednet_inflight_requests") == 2  # the slow request, and this scrape
        wait_until(lambda: sample(running.client, "rednet_inflight_requests") == 1, "the slow request's end")
        assert sample(running.client, "rednet_queue_depth") == 0
        assert predict(running.client, encoded(photo())).status_code == 200
