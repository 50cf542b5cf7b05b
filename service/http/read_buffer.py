"""Buffers the data that a connection has received and not parsed yet."""

from uvicorn.protocols.http.flow_control import FlowControl

HEAD_END = b"\r\n\r\n"


class ReadFlowControl(FlowControl):
    """Flow control that does not resume reading while received data waits to be parsed."""

    data_waits = False

    def resume_reading(self) -> None:
        if not self.data_waits:
            super().resume_reading()


class ReadBuffer:
    """Splits received data into pieces that do not extend beyond the end of a request.

    httptools parses all data that it is given, so that it must be given pipelined requests one by one. A request
    without a Content-Length ends with an empty line, and so pieces end after every empty line.
    """

    def __init__(self) -> None:
        self._data = b""
        self._start = 0  # of the unparsed data
        self._tail = b""  # the last three bytes before `_data`, as an empty line may begin in them
        self.body_bytes_left = 0  # of the current body, if it has a Content-Length

    def __bool__(self) -> bool:
        return self._start < len(self._data)

    def add(self, data: bytes) -> None:
        self._data, self._start = self.rest() + data if self else data, 0

    def rest(self) -> bytes:
        return self._data[self._start :]

    def clear(self) -> None:
        self._tail = self._data = b""
        self._start = 0

    def next(self, max_bytes: int | None = None) -> bytes | memoryview:
        """Remove and return the next piece. It is not empty unless the buffer is.

        Args:
            max_bytes: limits the piece, except in a body with a Content-Length.
        """
        data, start, size = self._data, self._start, len(self._data)
        if self.body_bytes_left:
            stop = min(size, start + self.body_bytes_left)
            self.body_bytes_left -= stop - start
        elif start == 0 and (found := (self._tail + data[:3]).find(HEAD_END)) >= 0:
            stop = found + len(HEAD_END) - len(self._tail)
        else:
            limit = size if max_bytes is None else min(size, start + max_bytes)
            found = data.find(HEAD_END, start, limit)
            stop = limit if found < 0 else found + len(HEAD_END)
        if stop == size:
            self._tail, self._data, self._start = data[-3:], b"", 0
        else:
            self._start = stop
        return data if stop - start == size else memoryview(data)[start:stop]
