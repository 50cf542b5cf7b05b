"""A large request body in memory shared with other processes."""

import asyncio
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

from rednet.service.errors import Overloaded

if sys.platform == "linux":
    import fcntl

Result = TypeVar("Result")

RETRY_S = 1.0  # for clients, and before closing a mapping that is still in use is tried again


class BodyFile:
    """An anonymous file that a body is appended to as it arrives, so that the event loop never copies all of it.

    Other processes get the file's descriptor. They may write behind the body and extend the file, but not shrink it:
    the server would crash when it reads beyond the end.

    Raises:
        Overloaded: the system has no memory or file descriptor left; also raised by `append` and `view`.
    """

    def __init__(self) -> None:
        self.size = 0
        self._mapping: mmap.mmap | None = None
        self._fd = _or_overloaded(_shared_memory)

    def fileno(self) -> int:
        return self._fd

    def append(self, data: bytes) -> None:
        def write() -> None:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, self.size)
                self.size += written
                view = view[written:]

        _or_overloaded(write)

    def head(self, count: int) -> bytes:
        """A copy of the first bytes. (The first view would fix the size of the mapping.)"""
        return os.pread(self._fd, min(count, self.size), 0)

    def view(self, start: int, stop: int) -> memoryview:
        """A view of a part of the file. The file must have reached its final size.

        Raises:
            ValueError: the part is not within the file.
        """
        if not self._mapping:
            self._mapping = _or_overloaded(lambda: mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))
        if not 0 <= start <= stop <= len(self._mapping):
            raise ValueError(f"{start} to {stop} is not in a file of {len(self._mapping)} bytes")
        return memoryview(self._mapping)[start:stop]

    def close(self) -> None:
        """Release the memory, on another thread: for 32 MB the system takes six milliseconds."""
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, self._unmap, loop)

    def _unmap(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            if self._mapping:
                self._mapping.close()
        except BufferError:  # an image of a cancelled request is still being sent to a decoder
            loop.call_soon_threadsafe(loop.call_later, RETRY_S, self.close)


def _or_overloaded(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except OSError as error:
        raise Overloaded(f"no memory for a large body: {error.strerror}; try again later", RETRY_S) from error


def _shared_memory() -> int:
    if sys.platform != "linux":
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    fd = os.memfd_create("body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd
