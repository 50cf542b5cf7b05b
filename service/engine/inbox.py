"""How messages reach an engine's thread."""

import queue
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from rednet.service.types import Job

Message = Job | int | None  # a job, the id of a job to cancel, or None: stop


class Inbox(Protocol):
    """Where messages to an engine arrive. Only `put` is called on other threads than the engine's."""

    def put(self, message: Message) -> None: ...

    def get(self, timeout_s: float | None) -> Sequence[Message]:
        """All messages that have arrived. If there are none, wait for one, up to `timeout_s` (None: without limit)."""

    def close(self) -> None:
        """No more messages will be read."""


class QueueInbox:
    """An `Inbox` for messages from this process."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        self._messages.put(message)

    def get(self, timeout_s: float | None) -> Sequence[Message]:
        found: list[Message] = []
        with suppress(queue.Empty):
            found.append(self._messages.get(timeout=timeout_s))
            while True:
                found.append(self._messages.get_nowait())
        return found

    def close(self) -> None:
        """Nothing waits for what is still in the queue."""
