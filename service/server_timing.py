"""Where the time of a request went: for the log, and for its client."""

from collections.abc import Sequence

from rednet.service.observability import log
from rednet.service.pipeline import Answer
from rednet.service.types import Inference


def note_timing(answers: Sequence[Answer], precision: str) -> str:
    """Add the times of the request's slowest image to its log lines; returns them as the value of `Server-Timing`.

    Args:
        answers: at least one of them an inference.
        precision: of the network.
    """
    inferences = [answer.outcome for answer in answers if isinstance(answer.outcome, Inference)]
    times = {
        "decode": max(answer.decode_s for answer in answers),
        "queue": max(inference.queue_s for inference in inferences),
        "inference": max(inference.inference_s for inference in inferences),
    }
    if drawn := [answer.drawn.draw_s for answer in answers if answer.drawn]:
        times["draw"] = max(drawn)
    batch = max(inference.batch_size for inference in inferences)
    log.note_ms(**times)
    log.note(batch_size=batch)
    entries = [f"{stage};dur={1000 * time_s:.1f}" for stage, time_s in times.items()]
    return ", ".join((*entries, f'batch;desc="{batch}"', f"precision;desc={precision}"))
