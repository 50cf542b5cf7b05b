"""Closes connections whose clients do not read their responses."""

import asyncio
import socket
import struct
import sys

if sys.platform == "linux":
    import fcntl
    import termios

# A client must read MIN_SENT_BYTES of a response every SEND_TIMEOUT_S. No network connection is slower than that, and
# with less the response would stay in memory for long.
SEND_TIMEOUT_S, MIN_SENT_BYTES = 30.0, 100_000


class SlowReaderMonitor:
    """Monitors one connection while its client reads more slowly than the server writes.

    Args:
        loop: of the connection.
        transport: of the connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(SEND_TIMEOUT_S, self._check, self._unsent_bytes())

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _check(self, unsent_before: int) -> None:
        if unsent_before - self._unsent_bytes() < MIN_SENT_BYTES:
            self._reset()
        else:
            self.start()

    def _unsent_bytes(self) -> int:
        """Bytes in the transport and in the kernel, which accepts more only after it has sent a large part."""
        in_kernel = bytes(4)
        if sys.platform == "linux":
            in_kernel = fcntl.ioctl(self._socket().fileno(), termios.TIOCOUTQ, in_kernel)
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _socket(self) -> socket.socket:
        connection: socket.socket = self._transport.get_extra_info("socket")
        return connection

    def _reset(self) -> None:
        """Close at once; the kernel drops its unsent data as well."""
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
