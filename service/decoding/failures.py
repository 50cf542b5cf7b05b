"""Decides what happens to an image when the worker that decodes it dies.

- A crash (SIGSEGV and the like, or a non-zero exit status) is blamed on the image if it happens twice: 422. The first
  time, another image or the worker itself may have been the cause, and the image is retried.
- SIGXCPU comes from the CPU time limit that the worker sets for each image: 422 at once. Time in which the worker waits
  for a core, or in which it or the machine is stopped, does not count.
- Any other signal comes from outside: an operator's `kill`, or the kernel when memory is short. A worker that makes no
  progress, which the server kills, counts as well. Nothing is known about the image then: it is retried, and answered
  with 503 after MAX_KILLS workers.
"""

import signal

from rednet.service.errors import DecoderUnavailable, ServiceError, UnreadableImage

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
MAX_CRASHES = 2
MAX_KILLS = 5


class FailureHistory:
    """The workers that have died over one image."""

    __slots__ = ("crashes", "kills")

    def __init__(self) -> None:
        self.crashes = 0
        self.kills = 0

    def on_exit(self, status: int) -> ServiceError | None:
        """Record that a worker has exited; returns the error of the image, or None to retry it."""
        if exceeded_cpu_limit(status):
            return UnreadableImage("decoding the image takes more processor time than the server allows")
        if is_external(status):
            return self.on_kill()
        self.crashes += 1
        return UnreadableImage("the image is damaged: it crashed the decoder") if self.crashes >= MAX_CRASHES else None

    def on_kill(self) -> ServiceError | None:
        """Record that a worker was killed from outside, or because it made no progress."""
        self.kills += 1
        return DecoderUnavailable() if self.kills >= MAX_KILLS else None


def is_external(status: int) -> bool:
    """Whether a signal from outside has ended the process."""
    return status < 0 and -status not in CRASHES


def exceeded_cpu_limit(status: int) -> bool:
    return status == -signal.SIGXCPU
