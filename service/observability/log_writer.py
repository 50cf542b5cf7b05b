"""Log lines on their way to a file descriptor, which may block, fail, or be read by nobody."""

import logging
import os
import select
import threading
import time

log = logging.getLogger(__name__)

MAX_PENDING_CHARS = 4_000_000  # some 10,000 requests; more is dropped
# After a write lines are collected for so long: one wake-up and one system call for all of them, which saves the
# event loop's thread a hundred times a second what a line costs.
COLLECT_S = 0.02
CLOSE_TIMEOUT_S = 2.0  # how long the end of the process waits for a log that is not read


class LogWriter:
    """What loggers need of a text stream. `write` never blocks and never fails: a thread writes to the descriptor.

    Lines that do not fit into memory, and lines that the descriptor does not take (its reader is gone, the disk is
    full), are dropped and counted. When lines are written again, one of them says how many are missing.

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
        """Nothing: whoever logs must not wait."""

    def close(self) -> None:
        """Wait until everything is written, but not for ever. What comes later is still accepted."""
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
            log.warning("%d log lines were dropped: nothing read them, or they could not be written", missing)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process made it non-blocking
            select.select((), (self._descriptor,), ())
            return 0
