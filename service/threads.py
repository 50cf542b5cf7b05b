"""Threads for work on bytes, as coroutines see them."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Threads:
    """So many threads behind one queue.

    The standard library's pool makes two futures and a condition variable for each call, which costs more than all
    else that a request needs of the event loop's thread. These make one future. They do not keep a process from ending.
    """

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count = count
        for index in range(count):
            threading.Thread(target=self._work, name=f"{name}_{index}", daemon=True).start()

    async def run(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """The function's result, from one of the threads. Cancelled before a thread took it up, it never runs."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def call() -> None:
            if future.cancelled():
                return
            settle: Callable[[], None]
            try:
                settle = partial(future.set_result, function(*arguments))
            except Exception as error:  # noqa: BLE001  (whoever awaits it is told)
                settle = partial(future.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed, and nobody awaits it any more
                loop.call_soon_threadsafe(_unless_cancelled, future, settle)

        self._queue.put(call)
        return await future

    def close(self) -> None:
        """End the threads once they have done what was asked of them before."""
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self) -> None:
        while call := self._queue.get():
            call()
            del call  # with what it was called with, which may be large, while there is nothing to do


def _unless_cancelled(future: "asyncio.Future[Result]", settle: Callable[[], None]) -> None:
    if not future.cancelled():
        settle()
