"""How many cores are ours."""

import os
from pathlib import Path

import pytest

from service.cores import usable_cores


@pytest.mark.parametrize(("limit", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("150000 100000", 2)])
def test_a_containers_quota_counts(tmp_path: Path, limit: str, cores: int) -> None:
    """What it may use of the machine's time, rounded up, and never more cores than there are."""
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores(tmp_path / "cpu.max") == min(cores, len(os.sched_getaffinity(0)))


def test_without_a_quota_affinity_counts(tmp_path: Path) -> None:
    """Whether the file is absent or says that there is no limit."""
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path / "cpu.max") == usable_cores(tmp_path / "absent") == len(os.sched_getaffinity(0))
