"""Short versions of `make chaos` and `make soak`."""

from pathlib import Path

import pytest

from tests import chaos
from tests.servers import ServerProcess
from tests.soak import soak

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("front_ends", [1, 2])
def test_server_recovers_from_chaos(tiny_path: Path, front_ends: int) -> None:
    """Every waiting request gets a documented answer. Afterwards gauges are zero, answers are right, and the server
    stops."""
    with ServerProcess("--checkpoint", tiny_path, "--frontends", front_ends, *chaos.OPTIONS) as server:
        report = chaos.run(server, 600 // front_ends, seed=1)
        assert report.left > 25
        assert report.decoders_killed > 0
        assert {200, 400, 413, 415, 422} <= report.statuses.keys()
        assert server.terminate() == 0


def test_memory_growth_under_load_is_bounded(tiny_path: Path) -> None:
    """Memory still grows a little in the first seconds. A leak of photos would take megabytes per second."""
    with ServerProcess("--checkpoint", tiny_path, *chaos.OPTIONS) as server:
        chaos.run(server, 300, seed=2)
        mb_a_second = soak(server, 10.0, every_s=0.0) / 600
        assert mb_a_second < 1.0
