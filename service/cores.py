"""How many cores this process may use."""

import os
from math import ceil
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "max 100000", or "150000 100000": microseconds of time in each period


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """The cores that the system lets it run on, or fewer where its container has less time than that.

    More threads than this would wait for each other while the system holds some of them back.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return cores
