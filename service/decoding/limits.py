"""What decoding may cost: every limit follows from --max-pixels and the memory that there is."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from rednet.service.system.cgroup import memory_limit_bytes

PROCESS_BYTES = 45_000_000  # of a decoder process that decodes nothing
RESERVE = 0.1  # share of all memory that stays free, for the server's own peaks and the system's caches
SMALL_BYTES = 64_000_000  # an image that takes more is decoded apart from others, one at a time
SMALL_S = 0.15  # so is one that takes longer
WORST_BYTES_PER_PIXEL = 22  # lossless WebP with transparency; `decode_cost` has the other formats
SLOWEST_S_PER_PIXEL = 2e-7  # a limit: five times what the slowest format takes
LEAST_CPU_S = 10.0
SMALL_LIMIT_S = 2.0  # processor time after which an image that looked small is decoded apart from others
SCANS = 20  # that a progressive JPEG of the largest size may have; the usual one has ten
LEAST_SCANNED = 1_000_000_000


class Cost(NamedTuple):
    """What one image is expected to take."""

    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True)
class DecodeLimits:
    """Limits on decoding, for all decoder processes of one front end.

    Attributes:
        max_pixels: width times height of one image.
        cpu_s: processor time for one image; an image that needs more is not decoded.
        large_bytes: memory for all large images that are being decoded, together.
        small: the costliest image that is decoded beside others.
        address_space_bytes: of one process, beyond what it starts with. A backstop: costs are estimates.
    """

    max_pixels: int
    cpu_s: float
    large_bytes: int
    small: Cost
    address_space_bytes: int

    @classmethod
    def derive(cls, max_pixels: int, memory_bytes: int, count: int) -> Self:
        """The limits for `count` processes of each kind that share so much memory."""
        small_bytes = min(SMALL_BYTES, memory_bytes // (16 * count))
        reserved = (2 * count + 1) * PROCESS_BYTES + count * small_bytes
        worst_bytes = WORST_BYTES_PER_PIXEL * max_pixels
        return cls(
            max_pixels=max_pixels,
            cpu_s=max(LEAST_CPU_S, max_pixels * SLOWEST_S_PER_PIXEL),
            large_bytes=max(0, memory_bytes - reserved),
            small=Cost(SMALL_S, small_bytes),
            address_space_bytes=500_000_000 + worst_bytes * 3 // 2,
        )

    @property
    def largest_pixels(self) -> int:
        """The largest image whose memory suffices in every format."""
        return self.large_bytes // WORST_BYTES_PER_PIXEL

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` has made of one, and JSON of that."""
        return cls(**fields | {"small": Cost(*fields["small"])})


def max_scanned_pixels(max_pixels: int) -> int:
    """How many pixels all scans of a progressive JPEG may have together."""
    return max(LEAST_SCANNED, SCANS * max_pixels)


def memory_for_decoders() -> int:
    """Memory that all decoder processes may use together, in bytes: what the machine or the control group has, less
    what this process uses already."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = min(pages, memory_limit_bytes() or pages)
    return max(0, int(total * (1 - RESERVE)) - _resident_bytes())


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0
