"""Memory of this process and of the system."""

import ctypes
import os
from contextlib import suppress

from rednet.service.system.cgroup import memory_left_bytes


def resident_bytes(pid: int | str = "self") -> int:
    """The memory of a process; 0: unknown."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def available_bytes() -> int | None:
    """Memory that the system and the limits of the control groups leave; None: unknown."""
    left = [memory_left_bytes()]
    with suppress(OSError), open("/proc/meminfo") as file:
        left += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    return min((each for each in left if each is not None), default=None)


def release_free_memory() -> None:
    """Give freed memory back to the system. The C library (glibc) keeps it for the threads that used it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
