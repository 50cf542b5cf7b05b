"""Accepts connections from a socket that several front ends share, so that each has as many as the others."""

import asyncio
import socket
from collections.abc import Callable

from rednet.service.processes.board import CONNECTIONS, Board
from rednet.service.system.listener import Listener

# How long a front end with more connections than another leaves a new one to it. If none takes it in that time, the
# other is busy or has died.
YIELD_S = 0.002


class Acceptor:
    """Accepts connections in this process.

    The kernel wakes up every front end for a new connection. The event loop's own server would then accept as many as
    there are, and often one process would have all of them.

    Args:
        listener: shared by the front ends.
        new_protocol: makes the protocol of a connection.
        connections: returns how many are open in this process.
        board: where front ends tell each other how many they have.
        row: of this front end.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_protocol: Callable[[], asyncio.Protocol],
        connections: Callable[[], int],
        board: Board,
        row: int,
    ) -> None:
        self._socket, self._listener = listener, Listener(listener, new_protocol)
        self._connections, self._board, self._row = connections, board, row
        self._loop = asyncio.get_running_loop()
        self._closed = False
        listener.setblocking(False)
        listener.listen(socket.SOMAXCONN)
        self._resume()

    def close(self) -> None:
        """Accept no more connections than those that wait already. May be called again."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket)
            self._listener.accept_all()

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket, self._on_readable)

    def _on_readable(self) -> None:
        own = self._connections() + self._listener.opening
        self._board.set(self._row, CONNECTIONS, own)
        if own > self._board.least(CONNECTIONS):
            self._loop.remove_reader(self._socket)
            self._loop.call_later(YIELD_S, self._accept_leftover)
        else:
            self._accept()

    def _accept_leftover(self) -> None:
        self._resume()
        if not self._closed:
            self._accept()

    def _accept(self) -> None:
        if self._listener.accept():
            self._board.set(self._row, CONNECTIONS, self._connections() + self._listener.opening)
