"""Threads as coroutines see them."""

import asyncio
import threading

import pytest

from service.threads import Threads
from tests.servers import PATIENCE_S, wait_until


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_results_and_errors_come_back() -> None:
    """From another thread than the caller's, each call its own."""
    threads = Threads(2, "results")

    async def ask() -> None:
        assert await asyncio.gather(*(threads.run(pow, 2, power) for power in range(20))) == [2**n for n in range(20)]
        assert await threads.run(threading.get_ident) != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 1, 0)
        assert await threads.run(pow, 2, 2) == 4  # the thread that met the error works on

    asyncio.run(ask())
    threads.close()
    wait_until(lambda: not named("results"), "the threads' end")


def test_what_is_cancelled_before_its_turn_never_runs() -> None:
    """What is running already goes on, and its result is dropped."""
    threads = Threads(1, "cancelled")
    go_on = threading.Event()
    ran: list[str] = []

    async def ask() -> None:
        first = asyncio.ensure_future(threads.run(go_on.wait, PATIENCE_S))
        second = asyncio.ensure_future(threads.run(ran.append, "the second"))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        go_on.set()
        assert await threads.run(pow, 2, 3) == 8

    asyncio.run(ask())
    threads.close()
    assert not ran
