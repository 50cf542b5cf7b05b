"""Tells what SIGHUP means: that the terminal was closed, or that a reload is requested."""

import errno
import logging
import os
import signal
import time
from types import FrameType
from typing import Literal

logger = logging.getLogger(__name__)

# A shell that exits may send SIGHUP to its jobs before it lets go of the terminal.
GRACE_S = 0.3


class Hangups:
    """Receives SIGHUP.

    A kernel that closes a terminal, and a shell that exits, send SIGHUP to end what was started there. Everything else
    that sends it (`kill -HUP`, systemd) requests a reload. So SIGHUP ends the server only if there was a terminal when
    this object was made, and it is gone.
    """

    def __init__(self) -> None:
        self._had_terminal = not _terminal_is_gone()
        self._received_at: float | None = None
        self.serving = False

    def install(self) -> None:
        """Handle the signal from now on, unless it is ignored, as under `nohup`."""
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self.receive)

    def log_if_ignored(self) -> None:
        """Say why reloads will not work, if so."""
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            logger.info("SIGHUP is ignored, as under nohup: API keys and checkpoint cannot be loaded again")

    def receive(self, sig: int = signal.SIGHUP, frame: FrameType | None = None) -> None:
        """The signal has come."""
        if not self.serving and self._is_closed():  # nothing has been admitted, and startup may take long
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGHUP)
        elif self._received_at is None:
            self._received_at = time.monotonic()

    def take(self) -> Literal["end", "reload"] | None:
        """What the signals since the last call mean; None: there were none, or it is not known yet."""
        if self._received_at is None:
            return None
        closed = self._is_closed()
        if not closed and self._had_terminal and time.monotonic() - self._received_at < GRACE_S:
            return None
        self._received_at = None
        return "end" if closed else "reload"

    def _is_closed(self) -> bool:
        return self._had_terminal and _terminal_is_gone()


def _terminal_is_gone() -> bool:
    """Whether this process has no controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        # Other errors, such as too many open files, say nothing about the terminal.
        return error.errno in (errno.ENXIO, errno.EIO, errno.ENOENT)
    return False
