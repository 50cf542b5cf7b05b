"""Logits to the classes that people read."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from service.types import Floats


class Score(TypedDict):
    index: int
    label: str
    probability: float


def top_classes(logits: Floats, names: Sequence[str], top_k: int) -> list[Score]:
    """The likeliest classes, best first; all of them where there are fewer than top_k. Equal ones in index order.

    Args:
        logits: [num_classes].
        names: one for each class.
        top_k: how many, at least 1.
    """
    exponentials = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Score(index=int(i), label=names[i], probability=float(probabilities[i])) for i in best]
