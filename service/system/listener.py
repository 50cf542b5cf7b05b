"""Accepts connections one by one, where asyncio's own server would decide by itself how many."""

import asyncio
import socket
from collections.abc import Callable


class Listener:
    """A listening socket.

    Args:
        listener: does not block; may be shared with other processes.
        new_protocol: makes the protocol of a connection.
    """

    def __init__(self, listener: socket.socket, new_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener, self._new_protocol = listener, new_protocol
        self._opening: set[asyncio.Task[object]] = set()

    @property
    def opening(self) -> int:
        """Connections that were accepted and have no protocol yet."""
        return len(self._opening)

    def accept(self) -> bool:
        """Accept a connection; returns whether there was one."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # another process has it, or the client is gone
            return False
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        opening = loop.create_task(loop.connect_accepted_socket(self._new_protocol, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    def accept_all(self) -> None:
        """Accept all connections that wait: if the socket were closed instead, clients would lose their requests."""
        while self.accept():
            pass
