"""Writes log lines to a file descriptor without blocking, even if nothing reads from it."""

import logging
import os
import select
import threading
import time

log = logging.getLogger(__name__)

MAX_PENDING_CHARS = 4_000_000  # the lines of some 10,000 requests; more are dropped
# After each write, lines are collected for this time and then written with one wake-up and one system call. Without it,
# the event loop's thread would pay for a wake-up with every line.
COLLECT_S = 0.02
CLOSE_TIMEOUT_S = 2.0  # for pending lines to be written when the process exits


class LogWriter:
    """A text stream for loggers whose `write` never blocks and never fails: a thread writes to the descriptor.

    Lines that exceed the limit on memory, and lines that cannot be written (the reader is gone, the disk is full), are
    dropped and counted. Once writing works again, a warning reports how many lines were dropped.

    Args:
        descriptor: blocking or not.
    """

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0  # lines
        self._descriptor = descriptor
        self._pending: list[str] = []
        self._pending_chars = 0
        self._lock = threading.RLock()  # a signal handler may log while its thread is in `write`
        self._not_empty = threading.Event()
        self._written = threading.Event()  # set while nothing is pending or being written
        self._written.set()
        self._closing = False
        self._reported = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        with self._lock:
            if self._pending_chars + len(text) > MAX_PENDING_CHARS:
                self.dropped += 1
                return len(text)
            self._pending.append(text)
            self._pending_chars += len(text)
            if not self._not_empty.is_set():
                self._written.clear()
                self._not_empty.set()
        return len(text)

    def flush(self) -> None:
        """Do nothing: logging must not block."""

    def close(self) -> None:
        """Wait until all lines are written, for a limited time. Later lines are still accepted."""
        self._closing = True
        self._written.wait(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            self._not_empty.wait()
            with self._lock:
                lines, self._pending, self._pending_chars = self._pending, [], 0
                self._not_empty.clear()
            self._write_all(lines)
            with self._lock:
                if not self._pending:
                    self._written.set()
            if not self._closing:
                time.sleep(COLLECT_S)

    def _write_all(self, lines: list[str]) -> None:
        data = memoryview("".join(lines).encode(errors="backslashreplace"))
        try:
            while data:
                data = data[self._write_some(data) :]
        except OSError:
            with self._lock:
                self.dropped += bytes(data).count(b"\n")
            return
        if self.dropped > self._reported:
            missing, self._reported = self.dropped - self._reported, self.dropped
            log.warning("%d log lines were dropped: they could not be written, or not fast enough", missing)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process made it non-blocking
            select.select((), (self._descriptor,), ())
            return 0
