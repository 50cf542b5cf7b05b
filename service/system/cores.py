"""Counts the cores that this process may use."""

import os
from math import ceil

from rednet.service.system.cgroup import cpu_limit


def usable_cores() -> int:
    """The number of cores in the CPU affinity, or fewer if the control group limits CPU time to less.

    If there were more threads, some of them would be throttled, and the others would wait for them.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else max(1, min(cores, ceil(limit)))
