"""Concurrent requests share batches."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import classes, predict, sample
from tests.servers import FakeRunner, ServerProcess, ServerThread


@pytest.fixture
def server(tiny_path: Path) -> Iterator[ServerProcess]:
    """A server with a short batching window: the tiny network alone is too fast for a queue to form."""
    with ServerProcess("--checkpoint", tiny_path, "--max-batch-size", 8, "--max-wait-ms", 20) as running:
        yield running


def test_concurrent_clients_share_batches_and_get_their_own_answers(server: ServerProcess) -> None:
    """With 32 concurrent clients, batches are larger than one, and each answer equals that of the photo alone."""
    photos = [encoded(photo(seed)) for seed in range(32)]
    alone = [classes(predict(server.client, data)) for data in photos]
    batches_before, images_before = batches(server.client)
    with ThreadPoolExecutor(32) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        together = [classes(answer) for answer in pool.map(lambda data: predict(client, data), photos * 4)]
    for ours, theirs in zip(together, alone * 4, strict=True):
        by_label = {entry["label"]: entry["probability"] for entry in theirs}
        for entry in ours:
            assert entry["probability"] == pytest.approx(by_label[entry["label"]], abs=1e-4)
    batches_after, images_after = batches(server.client)
    assert images_after - images_before == 128
    assert batches_after - batches_before < 128


def batches(client: httpx.Client) -> tuple[float, float]:
    return sample(client, "rednet_batch_size_count"), sample(client, "rednet_batch_size_sum")


def test_batching_window_fills_batches_up_to_the_maximum_size() -> None:
    """With --max-wait-ms, requests that arrive one after another share batches, up to the size that warm-up chose."""
    runner = FakeRunner()
    runner.max_batch_size = 4
    with ServerThread(runner, max_wait_ms=10_000) as running, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: predict(running.client, encoded(photo(seed))), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert runner.batches == [4, 4]


def test_single_request_is_not_delayed_by_default() -> None:
    """There is no batching window by default: an image waits only for the device."""
    with ServerThread(FakeRunner()) as running:
        timing = predict(running.client, encoded(photo())).headers["server-timing"]
        queued_ms = float(timing.split("queue;dur=")[1].split(",")[0])
        assert queued_ms < 1000
