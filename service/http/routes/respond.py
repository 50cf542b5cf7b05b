"""The last step of every response about images."""

import time
from collections.abc import Iterable, Mapping, Sequence

from fastapi import Response

from rednet.service.event_loop import in_turns
from rednet.service.http.routes.context import Context
from rednet.service.http.routes.pieces import PiecesResponse
from rednet.service.pipeline import Answer
from rednet.service.server_timing import note_timing


async def respond(
    body: Iterable[bytes],
    media_type: str,
    answers: Sequence[Answer],
    server: Context,
    started: float,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response with a body, and `Server-Timing` for its slowest image.

    Args:
        body: its pieces, each made in at most a millisecond.
        answers: at least one of them an inference.
        started: when the answers were complete, by `time.monotonic()`.
        headers: additional ones.
    """
    pieces = [piece async for piece in in_turns(body)]
    server.pipeline.metrics.stage("respond", time.monotonic() - started)
    timing = note_timing(answers, server.pipeline.model.precision)
    return PiecesResponse(pieces, media_type, {"Server-Timing": timing, **(headers or {})}, server.budget)
