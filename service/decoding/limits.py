"""Limits on the time and memory of decoding. All of them follow from --max-pixels and the available memory."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from rednet.service.system.cgroup import memory_limit_bytes
from rednet.service.system.memory import resident_bytes

PROCESS_BYTES = 45_000_000  # memory of an idle decoder process
RESERVED_SHARE = 0.1  # of all memory, for the server's own peaks and the system's caches
MAX_SMALL_BYTES = 64_000_000  # images that need more are decoded in a pool of their own, a few at a time
MAX_SMALL_S = 0.15  # as are images that take longer
WORST_BYTES_PER_PIXEL = 22  # lossless WebP with transparency; `cost.py` has the other formats
MAX_S_PER_PIXEL = 2e-7  # HEIC, the slowest format, takes up to 1.4e-7 for photos from cameras
MIN_CPU_LIMIT_S = 10.0
SMALL_CPU_LIMIT_S = 2.0  # an image that was estimated as small, but takes longer, moves to the pool for large images
MAX_SCANS = 20  # of a progressive JPEG of the largest size; ten are usual
MIN_SCANNED_PIXELS = 1_000_000_000  # allowed for every progressive JPEG


class Cost(NamedTuple):
    """The expected cost of decoding one image."""

    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True)
class DecodeLimits:
    """Limits for all decoder processes of one server.

    Attributes:
        max_pixels: width times height of one image.
        cpu_s: CPU time for one image; an image that needs more is rejected.
        large_bytes: memory for all large images that are decoded at the same time.
        small: costliest image that counts as small.
        address_space_bytes: of one process, beyond what it starts with. A safeguard, as costs are only estimated.
    """

    max_pixels: int
    cpu_s: float
    large_bytes: int
    small: Cost
    address_space_bytes: int

    @classmethod
    def derive(cls, max_pixels: int, memory_bytes: int, count: int) -> Self:
        """Derive the limits for `count` processes of each kind that share `memory_bytes`."""
        small_bytes = min(MAX_SMALL_BYTES, memory_bytes // (16 * count))
        reserved = (2 * count + 1) * PROCESS_BYTES + count * small_bytes
        worst_bytes = WORST_BYTES_PER_PIXEL * max_pixels
        return cls(
            max_pixels=max_pixels,
            cpu_s=max(MIN_CPU_LIMIT_S, max_pixels * MAX_S_PER_PIXEL),
            large_bytes=max(0, memory_bytes - reserved),
            small=Cost(MAX_SMALL_S, small_bytes),
            address_space_bytes=500_000_000 + worst_bytes * 3 // 2,
        )

    @property
    def largest_pixels(self) -> int:
        """The most pixels that can be decoded in every format."""
        return self.large_bytes // WORST_BYTES_PER_PIXEL

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Restore limits that went through `dataclasses.asdict` and JSON."""
        return cls(**fields | {"small": Cost(*fields["small"])})


def max_scanned_pixels(max_pixels: int) -> int:
    """The most pixels that all scans of a progressive JPEG may have together."""
    return max(MIN_SCANNED_PIXELS, MAX_SCANS * max_pixels)


def memory_for_decoders() -> int:
    """Memory for all decoder processes together, in bytes: that of the machine or the control group, minus a reserve
    and the memory that this process uses already."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = min(pages, memory_limit_bytes() or pages)
    return max(0, int(total * (1 - RESERVED_SHARE)) - resident_bytes())
