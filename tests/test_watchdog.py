"""The watchdog for a hung device, which ignores slow work and idle time."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rednet.service.engine import watchdog as hang_watch
from rednet.service.engine.watchdog import HUNG_FACTOR, MAX_GAP_S, Watchdog
from tests.conftest import encoded, photo
from tests.http_helpers import PNG
from tests.servers import ServerProcess, wait_until


class Time:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(hang_watch, "time", clock)
    return clock


def observe(watch: Watchdog, clock: Time, seconds: float, step_s: float = 0.1) -> bool:
    for _ in range(round(seconds / step_s)):
        clock.now += step_s
        watch.check()
    return watch.hung


def test_watchdog_reports_work_after_its_time_limit(clock: Time) -> None:
    """The limit is the minimum for short work, and otherwise a multiple of the predicted time."""
    watch = Watchdog(threading.current_thread(), hung_s=30.0)
    watch.begin(expected_s=0.1)
    watch.check()
    assert not observe(watch, clock, 29)
    watch.end()
    watch.check()
    watch.begin(expected_s=10.0)
    watch.check()
    assert not observe(watch, clock, HUNG_FACTOR * 10 - 1)
    assert observe(watch, clock, 2)


def test_watchdog_limit_is_ten_times_longer_when_compiling(clock: Time) -> None:
    """Work that may compile gets ten times the minimum."""
    watch = Watchdog(threading.current_thread(), hung_s=30.0)
    watch.begin(0.1, factor=10.0)
    watch.check()
    assert not observe(watch, clock, 299)
    assert observe(watch, clock, 2)


def test_watchdog_measures_each_piece_of_work_separately(clock: Time) -> None:
    """A busy device does not look hung, however rarely the watchdog runs."""
    watch = Watchdog(threading.current_thread(), hung_s=2.0)
    for _ in range(100):
        watch.begin(0.01)
        assert not observe(watch, clock, 1.0)
        watch.end()
    clock.now += 1000
    assert not watch.check()


def test_watchdog_ignores_time_in_which_the_process_was_suspended(clock: Time) -> None:
    """One second of an hour's suspension within a batch is counted."""
    watch = Watchdog(threading.current_thread(), hung_s=30.0)
    watch.begin(0.1)
    watch.check()
    assert not observe(watch, clock, 10)
    clock.now += 3600
    assert not watch.check()
    assert not observe(watch, clock, 30 - 10 - MAX_GAP_S - 1)
    assert observe(watch, clock, 2)


@pytest.mark.slow
def test_suspended_server_continues_under_load(tiny_path: Path) -> None:
    """After SIGSTOP for longer than the limit and SIGCONT, every request is answered."""
    script = (
        "import sys; from rednet.service.cli.parser import main; from rednet.service.engine import engine\n"
        "begin = engine.Engine.__init__\n"
        "engine.Engine.__init__ = lambda *arguments: begin(*arguments[:4], 1.5)  # hung_s\n"
        "sys.exit(main())"
    )
    with ServerProcess("--checkpoint", tiny_path, script=script) as running:
        statuses: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses.append(running.client.post("/v1/predict", content=encoded(photo()), headers=PNG).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(statuses) > 20, "traffic")
        for _ in range(3):
            os.kill(running.process.pid, signal.SIGSTOP)
            time.sleep(2.5)
            os.kill(running.process.pid, signal.SIGCONT)
            before = len(statuses)
            wait_until(lambda before=before: len(statuses) > before + 10, "traffic again")  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        assert "hangs" not in running.log
        assert running.terminate() == 0
