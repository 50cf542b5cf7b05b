"""Deadlines of clients that are shorter than the server's own are counted separately, because alerts are about the
server's."""

from concurrent.futures import ThreadPoolExecutor

from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, assert_error, occupy, predict, sample
from tests.servers import FakeRunner, ServerThread

EXCEEDED = "rednet_short_deadline_exceeded_total"


def test_short_deadline_counter_excludes_the_server_deadline() -> None:
    """The status is 504 for both."""
    runner = FakeRunner()
    with ServerThread(runner, request_timeout_s=1) as running, ThreadPoolExecutor() as pool:
        held = occupy(running, runner, pool)  # until the server's deadline
        assert_error(held.result(), 504, "deadline_exceeded")
        assert sample(running.client, EXCEEDED) == 0
        runner.go_on.set()
        assert predict(running.client, encoded(photo())).status_code == 200
        runner.go_on.clear()
        headers = {"X-Request-Timeout-Ms": "100"}
        assert_error(predict(running.client, encoded(photo()), **headers), 504, "deadline_exceeded")
        assert sample(running.client, EXCEEDED) == 1
        labels = {"endpoint": PREDICT, "status": "504"}
        assert sample(running.client, "rednet_request_duration_seconds_count", **labels) == 2
        runner.go_on.set()


def test_rejection_for_a_hopeless_deadline_is_counted_separately() -> None:
    """Even an idle server would miss a deadline of a millisecond, so it is not overload."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor() as pool:
        held = occupy(running, runner, pool)
        headers = {"X-Request-Timeout-Ms": "1"}
        assert_error(predict(running.client, encoded(photo()), **headers), 429, "overloaded")
        assert sample(running.client, "rednet_refused_total", reason="short_deadline") == 1
        assert sample(running.client, "rednet_refused_total", reason="overloaded") == 0
        runner.go_on.set()
        assert held.result().status_code == 200
