"""The last step of every response about images."""

import time
from collections.abc import Iterable, Mapping, Sequence

from fastapi import Response

from rednet.service.http.routes.context import Context
from rednet.service.http.routes.pieces import PiecesResponse, in_turns
from rednet.service.observability import log
from rednet.service.pipeline import Answer
from rednet.service.types import Inference


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
    inferences = [answer.outcome for answer in answers if isinstance(answer.outcome, Inference)]
    times = {  # the slowest image's
        "decode": max(answer.decode_s for answer in answers),
        "queue": max(inference.queue_s for inference in inferences),
        "inference": max(inference.inference_s for inference in inferences),
    }
    if drawn := [answer.drawn.draw_s for answer in answers if answer.drawn]:
        times["draw"] = max(drawn)
    batch = max(inference.batch_size for inference in inferences)
    log.note_ms(**times)
    log.note(batch_size=batch)
    timing = _timing(times, batch, server.pipeline.model.precision)
    return PiecesResponse(pieces, media_type, {"Server-Timing": timing, **(headers or {})}, server.budget)


def _timing(times: Mapping[str, float], batch: int, precision: str) -> str:
    entries = [f"{stage};dur={1000 * time_s:.1f}" for stage, time_s in times.items()]
    return ", ".join((*entries, f'batch;desc="{batch}"', f"precision;desc={precision}"))
