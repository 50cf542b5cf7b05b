"""The short forms of `make chaos` and `make soak`."""

from pathlib import Path

from tests import chaos
from tests.servers import ServerProcess
from tests.soak import soak


def test_nothing_is_left_of_chaos(tiny_path: Path) -> None:
    """Every request that waits is answered as promised; then gauges are zero and answers right, and it can stop."""
    with ServerProcess("--checkpoint", tiny_path, *chaos.OPTIONS) as server:
        report = chaos.run(server, 600, seed=1)
        assert report.left > 50
        assert report.decoders_killed > 0
        assert {200, 400, 413, 415, 422} <= report.statuses.keys()
        assert server.terminate() == 0


def test_memory_does_not_run_away(tiny_path: Path) -> None:
    """In its first seconds it still grows, and later a little; requests that left their photos behind would take
    megabytes."""
    with ServerProcess("--checkpoint", tiny_path, *chaos.OPTIONS) as server:
        chaos.run(server, 300, seed=2)
        mb_a_second = soak(server, 10.0, every_s=0.0) / 600
        assert mb_a_second < 1.0
