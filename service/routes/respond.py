"""The last step of every answer about images."""

import time
from collections.abc import Mapping, Sequence

from fastapi import Response

from service.journey import Answer
from service.metrics import Metrics
from service.types import Inference


def respond(
    body: bytes,
    media_type: str,
    answers: Sequence[Answer],
    metrics: Metrics,
    started: float,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response around a body, with where the time went.

    Args:
        body: encoded since `started`, by `time.monotonic()`.
        answers: at least one of them an inference.
        headers: more of them.
    """
    metrics.stage("respond", time.monotonic() - started)
    return Response(body, media_type=media_type, headers={"Server-Timing": _server_timing(answers), **(headers or {})})


def _server_timing(answers: Sequence[Answer]) -> str:
    """The slowest image's times, in milliseconds, and the largest batch."""
    inferences = [answer.outcome for answer in answers if isinstance(answer.outcome, Inference)]
    decode_s = max(answer.decode_s for answer in answers)
    queue_s = max(inference.queue_s for inference in inferences)
    inference_s = max(inference.inference_s for inference in inferences)
    batch = max(inference.batch_size for inference in inferences)
    times = {"decode": decode_s, "queue": queue_s, "inference": inference_s}
    return ", ".join(f"{stage};dur={1000 * time_s:.1f}" for stage, time_s in times.items()) + f', batch;desc="{batch}"'
