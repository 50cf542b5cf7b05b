"""Keeps long work from blocking the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

Item = TypeVar("Item")

SLICE_S = 0.001  # of work, before the event loop serves other requests


async def in_turns(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The same items; the event loop serves other requests after every millisecond of work on them."""
    since = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - since > SLICE_S:
            await asyncio.sleep(0)
            since = time.monotonic()
