"""Reports on long runs: a progress bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from rednet.model.io.text import clean_text

Item = TypeVar("Item")

LOG_INTERVAL_S = 10.0
_LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {remaining} left"


def progress(items: Iterable[Item], *, total: int, done: int = 0, describe: str) -> Iterator[Item]:
    """Yield the items, and report count, rate and remaining time on standard error.

    Args:
        items: the items that remain.
        total: number of items, those done before included.
        done: number of items that were done before.
        describe: label of the progress line.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=describe, total=total, initial=done, leave=False)
        return
    started = reported = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - reported >= LOG_INTERVAL_S:
            reported = now
            meter = tqdm.format_meter(
                done + count, total, now - started, prefix=describe, initial=done, bar_format=_LINE
            )
            print(meter, file=sys.stderr, flush=True)


def log(text: str) -> None:
    """Print a line on standard error, without the control characters that names of files may have."""
    print(clean_text(text), file=sys.stderr)
