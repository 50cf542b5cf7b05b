"""How many cores this process may use."""

import os
from math import ceil

from rednet.service.system.cgroup import cpu_limit


def usable_cores() -> int:
    """The cores that the system schedules it on, or fewer where its control group has less time than that.

    More threads than this would wait for each other while the system holds some of them back.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else max(1, min(cores, ceil(limit)))
