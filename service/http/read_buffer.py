"""What a connection has received and not yet parsed."""

HEAD_END = b"\r\n\r\n"


class Incoming:
    """Cuts received bytes into pieces of which none reaches beyond the end of a request.

    httptools parses all that it is given, so that a parser must be given the requests of a pipeline one by one. Every
    request without a Content-Length ends with an empty line, which is where these pieces end.
    """

    def __init__(self) -> None:
        self._data = b""
        self._start = 0  # of what waits
        self._tail = b""  # the last three bytes before `_data`: an empty line may begin in them
        self.length_left = 0  # bytes of the current body that are still to come, if it has a Content-Length

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
        """The next piece; not empty if anything waits.

        Args:
            max_bytes: of a piece outside a body with a Content-Length.
        """
        data, start, size = self._data, self._start, len(self._data)
        if self.length_left:
            stop = min(size, start + self.length_left)
            self.length_left -= stop - start
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
