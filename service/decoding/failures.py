"""Whose fault it is that a decoder process ended over an image: the one place for this rule.

- A crash (SIGSEGV and its like, or an exit status of its own) is the image's, if it happens to the same image twice:
  422. The first time, another image or the process itself may have been the reason, and the image is tried again.
- SIGXCPU comes from the limit that the process sets itself for each image, in processor time: 422 at once. Time that
  passes while the process waits for a core, or while it or the machine is stopped, does not count.
- Any other signal comes from outside: somebody's `kill`, or the system when memory is short. So does a process that no
  longer makes progress, and that the server therefore ends. Nothing is known about the image: it is tried again, and
  after MAX_LOSSES processes it is answered with 503.
"""

import signal

from rednet.service.errors import DecoderUnavailable, ServiceError, UnreadableImage

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
MAX_CRASHES = 2
MAX_LOSSES = 5


class History:
    """What happened to one image so far."""

    __slots__ = ("crashes", "losses")

    def __init__(self) -> None:
        self.crashes = 0
        self.losses = 0

    def ended(self, status: int) -> ServiceError | None:
        """Take note that a process ended over the image; returns the image's error, or None: try again."""
        if exceeded_cpu_limit(status):
            return UnreadableImage("decoding the image takes too long")
        if came_from_outside(status):
            return self.lost()
        self.crashes += 1
        return UnreadableImage("the image is damaged: it broke the decoder") if self.crashes >= MAX_CRASHES else None

    def lost(self) -> ServiceError | None:
        """The process was killed, or made no progress."""
        self.losses += 1
        return DecoderUnavailable() if self.losses >= MAX_LOSSES else None


def came_from_outside(status: int) -> bool:
    return status < 0 and -status not in CRASHES


def exceeded_cpu_limit(status: int) -> bool:
    return status == -signal.SIGXCPU
