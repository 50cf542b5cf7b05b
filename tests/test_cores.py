"""How many cores are ours."""

import os

import pytest

from rednet.service.system import cores
from rednet.service.system.cores import usable_cores


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.01, 1), (0.5, 1), (1.0, 1), (1.5, 2), (1e6, 1 << 20), (None, 1 << 20)]
)
def test_the_quota_is_rounded_up_and_affinity_is_the_most(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int
) -> None:
    """Half a core needs one thread, one core and a half two, and nothing needs more threads than there are cores."""
    monkeypatch.setattr(cores, "cpu_limit", lambda: limit)
    assert usable_cores() == min(expected, len(os.sched_getaffinity(0)))
