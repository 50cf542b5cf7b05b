"""The number of usable cores."""

import os

import pytest

from rednet.service.system import cores
from rednet.service.system.cores import usable_cores


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.01, 1), (0.5, 1), (1.0, 1), (1.5, 2), (1e6, 1 << 20), (None, 1 << 20)]
)
def test_usable_cores_is_the_rounded_up_quota_within_affinity(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int
) -> None:
    """Half a core gives one thread, one and a half give two, and never more than the process's affinity allows."""
    monkeypatch.setattr(cores, "cpu_limit", lambda: limit)
    assert usable_cores() == min(expected, len(os.sched_getaffinity(0)))
