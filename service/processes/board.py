"""Numbers that the front ends of a server share. Each is written by one process and read by all, without locks: a
reader may see a value that is a moment old, but never half of one."""

import mmap
import os

COLUMNS = ACCEPTED, OFFERED_S, CONNECTIONS, SLOTS_IN_USE, LOG_LINES_DROPPED = range(5)
CELL_BYTES = 8


class Board:
    """One row of numbers for each front end.

    Args:
        fd: of the memory, from `allocate`; it stays open and is not owned.
    """

    def __init__(self, fd: int) -> None:
        self._cells = memoryview(mmap.mmap(fd, 0)).cast("d")
        self.rows = len(self._cells) // len(COLUMNS)

    @staticmethod
    def allocate(rows: int) -> int:
        """The descriptor of memory for so many front ends, all of it zero."""
        fd = os.memfd_create("board", os.MFD_CLOEXEC)
        os.ftruncate(fd, rows * len(COLUMNS) * CELL_BYTES)
        return fd

    def get(self, row: int, column: int) -> float:
        return self._cells[row * len(COLUMNS) + column]

    def set(self, row: int, column: int, value: float) -> None:
        self._cells[row * len(COLUMNS) + column] = value

    def total(self, column: int) -> float:
        """The sum over all front ends."""
        return sum(self._cells[column :: len(COLUMNS)])

    def least(self, column: int) -> float:
        """The smallest number of any front end."""
        return min(self._cells[column :: len(COLUMNS)])


class SharedCounts:
    """The `QueueCounts` of one front end.

    Args:
        board: of the server.
        row: of this front end. What the one before it has offered is kept: counters never go back.
    """

    def __init__(self, board: Board, row: int) -> None:
        self._board, self._row = board, row
        self.processes = board.rows

    @property
    def accepted(self) -> int:
        return int(self._board.get(self._row, ACCEPTED))

    @accepted.setter
    def accepted(self, images: int) -> None:
        self._board.set(self._row, ACCEPTED, images)

    @property
    def offered_s(self) -> float:
        return self._board.get(self._row, OFFERED_S)

    @offered_s.setter
    def offered_s(self, seconds: float) -> None:
        self._board.set(self._row, OFFERED_S, seconds)

    def total_accepted(self) -> int:
        return int(self._board.total(ACCEPTED))

    def total_offered_s(self) -> float:
        return self._board.total(OFFERED_S)
