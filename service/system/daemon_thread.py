"""Calls blocking functions on threads that do not keep the process from exiting."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def run_in_daemon_thread(function: Callable[[], Result]) -> Result:
    """Call a function on a thread of its own. Cancelling leaves the thread behind, and the process may exit meanwhile;
    with `asyncio.to_thread` the event loop would wait for it."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="daemon", daemon=True).start()
    return await asyncio.wrap_future(future)
