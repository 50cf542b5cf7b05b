"""Logits to the classes that people read."""

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
    """Their softmax over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    result: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def top_classes(logits: Floats, names: Sequence[str], top_k: int) -> list[Score]:
    """The likeliest classes, best first; all of them where there are fewer than top_k. Equal ones in index order.

    Args:
        logits: [num_classes].
        names: one for each class.
        top_k: how many, at least 1.
    """
    shares = probabilities(logits)
    best = np.argsort(-shares, kind="stable")[:top_k]
    return [Score(index=int(i), label=names[i], probability=float(shares[i])) for i in best]
