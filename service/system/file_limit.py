"""Raises the limit on open files."""

import resource
from contextlib import suppress

MAX_OPEN_FILES = 65_536  # connections, above all


def raise_file_limit() -> None:
    """Many systems allow a process a thousand open files unless it asks for more, and idle connections count."""
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    with suppress(ValueError):  # the system may have a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), hard))
