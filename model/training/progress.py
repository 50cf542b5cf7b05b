"""Progress of long loops: a bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_EVERY_S = 10.0
_LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {remaining} left"


def progress(items: Iterable[Item], *, total: int, done: int = 0, describe: str) -> Iterator[Item]:
    """The items, telling on standard error how far along they are, how fast, and how long the rest will take.

    Args:
        items: those still to do.
        total: how many there are in all.
        done: how many of those were done before.
        describe: what the line begins with.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=describe, total=total, initial=done, leave=False)
        return
    started = told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= LINE_EVERY_S:
            told = now
            meter = tqdm.format_meter(
                done + count, total, now - started, prefix=describe, initial=done, bar_format=_LINE
            )
            print(meter, file=sys.stderr, flush=True)
