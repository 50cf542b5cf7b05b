"""Limits on the memory that this process may map."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def limit_address_space(extra_bytes: int) -> None:
    """Let this process map only so many bytes more. Beyond that, memory has run out for it."""
    with suppress(OSError, ValueError):
        mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        present = resource.getrlimit(resource.RLIMIT_AS)
        bounds = [bound for bound in present if bound != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([mapped_bytes + extra_bytes, *bounds]), present[1]))


@contextmanager
def limited_address_space(extra_bytes: int) -> Iterator[None]:
    """The same until the context ends."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_address_space(extra_bytes)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, before)
