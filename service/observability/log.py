"""Logs on standard error, for people or as JSON, each line with what is known of the request it belongs to."""

import atexit
import logging
import random
import sys
from contextvars import ContextVar
from typing import Literal, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from rednet.service.observability.log_writer import LogWriter

_known: ContextVar[dict[str, str | float]] = ContextVar("known")  # of the request that is being answered


def configure(level: str, log_format: Literal["text", "json"]) -> LogWriter:
    """Send everything to standard error: what comes through `logging`, and structlog's own lines, of which there is one
    for every request, and which take half as long. Returns what writes it, until the process ends."""
    writer = LogWriter(sys.stderr.fileno())
    atexit.register(writer.close)
    stream = cast("TextIO", writer)
    text = structlog.dev.ConsoleRenderer(
        colors=False, pad_event_to=0, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )
    render: Processor = structlog.processors.JSONRenderer(_json) if log_format == "json" else text
    known: list[Processor] = [structlog.processors.TimeStamper(fmt="iso"), structlog.stdlib.add_log_level, _add_known]
    structlog.configure(
        processors=[*known, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*known, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    return writer


def _json(event: EventDict, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()


def _add_known(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**event, **_known.get({})}


def new_id() -> str:
    """For a request that has none."""
    return f"{random.getrandbits(128):032x}"


def begin_request(request_id: str) -> None:
    """From here on lines belong to this request."""
    _known.set({"request_id": request_id})


def note(**values: str | float) -> None:
    """Show these values on the further lines of this request, its last one above all."""
    _known.get().update(values)


def note_ms(**times_s: float) -> None:
    """The same for times in seconds, as milliseconds: `queue=0.012` is shown as `queue_ms=12.0`."""
    note(**{f"{name}_ms": round(1000 * time_s, 2) for name, time_s in times_s.items()})
