"""Closes connections whose client does not read what it asked for."""

import asyncio
import socket
import struct
import sys

if sys.platform == "linux":
    import fcntl
    import termios

UNREAD_S = 30.0  # in which a client must read something of an answer
UNREAD_BYTES = 100_000  # so much: no line is slower, but less would hold an answer in memory for long


class ReaderWatch:
    """Watches one connection while its client reads more slowly than the server writes.

    Args:
        loop: of the connection.
        transport: of the connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(UNREAD_S, self._check, self._left_to_send())

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _check(self, left_before: int) -> None:
        if left_before - self._left_to_send() < UNREAD_BYTES:
            self._reset()
        else:
            self.start()

    def _left_to_send(self) -> int:
        """Bytes, also those that the system holds: it takes new ones only when a large part of those has gone."""
        held = bytes(4)
        if sys.platform == "linux":
            held = fcntl.ioctl(self._socket().fileno(), termios.TIOCOUTQ, held)
        return self._transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def _socket(self) -> socket.socket:
        connection: socket.socket = self._transport.get_extra_info("socket")
        return connection

    def _reset(self) -> None:
        """Close at once: the system, too, drops what it still holds for the client."""
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
