"""The order of classes, whichever way they are found."""

import numpy as np
import pytest

from rednet.service.model_description import LabelBody
from rednet.service.scores import FEW, most_probable, probabilities, top_classes


@pytest.mark.parametrize("count", [1, 5, FEW, FEW + 1, 1000, 2000])
def test_most_probable_equals_a_stable_sort(count: int) -> None:
    """Also where many classes are equally probable: they are in index order."""
    random = np.random.default_rng(0)
    for logits in (random.normal(size=1000), random.integers(-3, 3, size=1000), np.zeros(1000)):
        values = probabilities(logits.astype(np.float32))
        order = sorted(range(1000), key=lambda index: -values[index])[:count]
        assert most_probable(logits.astype(np.float32), count) == [(index, values[index]) for index in order]


def test_top_classes_of_a_small_network() -> None:
    """All classes, if there are fewer than were asked for."""
    labels = [LabelBody(index=index, id=f"n{index}", label=name) for index, name in enumerate("abc")]
    found = top_classes(np.log(np.array([1, 3, 4], np.float32)), labels, 5)
    assert [(score["index"], score["id"], score["label"]) for score in found] == [
        (2, "n2", "c"),
        (1, "n1", "b"),
        (0, "n0", "a"),
    ]
    assert [score["probability"] for score in found] == pytest.approx([0.5, 0.375, 0.125])
