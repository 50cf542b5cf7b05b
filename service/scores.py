"""Turns logits into labelled probabilities."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from rednet.service.types import Floats


class Score(TypedDict):
    index: int
    label: str
    probability: float


def probabilities(logits: Floats) -> NDArray[np.float64]:
    """The softmax of the logits over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    result: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def top_classes(logits: Floats, names: Sequence[str], top_k: int) -> list[Score]:
    """The most probable classes, best first. Classes of equal probability are in index order.

    Args:
        logits: [num_classes].
        names: of all classes.
        top_k: number of classes, at least 1. If the network has fewer, all of them are returned.
    """
    values = probabilities(logits)
    best = np.argsort(-values, kind="stable")[:top_k]
    return [Score(index=int(i), label=names[i], probability=float(values[i])) for i in best]
