"""The table of measured times, and how it is made."""

import pytest

from rednet.service.cost_table import CostTable, measure


def test_times_between_and_beyond_what_was_measured() -> None:
    """Between two sizes in proportion; beyond the largest, as that one per image; nothing for nothing."""
    costs = CostTable({1: 1.0, 4: 2.5, 8: 4.0}, max_batch_size=8)
    assert [costs.batch_s(n) for n in (0, 1, 3, 4, 6, 8, 16)] == [0.0, 1.0, 2.0, 2.5, 3.25, 4.0, 8.0]


def test_a_queue_is_full_batches_and_a_rest() -> None:
    """21 images in batches of 8 are 8, 8 and 5."""
    costs = CostTable({1: 1.0, 4: 2.5, 8: 4.0}, max_batch_size=8)
    assert costs.queue_s(21) == 4.0 + 4.0 + costs.batch_s(5)


def test_before_anything_is_measured_nothing_is_predicted() -> None:
    """A table without entries predicts no time, instead of failing."""
    assert CostTable().queue_s(100) == 0.0


@pytest.mark.parametrize(
    ("per_image", "best"),
    [
        ({}, 1),  # larger batches gain nothing
        ({2: 0.5}, 2),  # two cores: an image each
        ({2: 0.85, 4: 0.7, 8: 0.5, 16: 0.49}, 8),
        ({2: 0.85, 4: 0.7, 8: 0.6, 16: 0.5, 32: 0.4, 64: 0.3}, 64),
    ],
)
def test_batches_grow_while_that_is_worthwhile(per_image: dict[int, float], best: int) -> None:
    """The smallest size is taken than which twice as much gains less than a twentieth; then measuring soon stops."""
    measured: list[int] = []
    last = 1.0

    def batch_s(size: int) -> float:
        nonlocal last
        measured.append(size)
        last = per_image.get(size, last)
        return size * last

    costs = measure(batch_s, 64, auto=True)
    assert costs.max_batch_size == best
    assert measured == list(costs.seconds) == [2**n for n in range(len(measured))]
    assert measured[-1] <= min(4 * best, 64)


def test_auto_does_not_go_below_the_least() -> None:
    """However little larger batches gain; where not even those fit, the largest that did is taken."""
    assert measure(float, 64, auto=True, min_size=3).max_batch_size == 3
    assert measure(float, 2, auto=True, min_size=3).max_batch_size == 2
    assert measure(lambda size: size * (0.5 if size == 8 else 1.0), 64, auto=True, min_size=4).max_batch_size == 8


def test_a_size_that_was_asked_for_is_kept() -> None:
    """Whatever it gains; the sizes below it are measured, too."""
    costs = measure(lambda _: 1.0, 6, auto=False)
    assert costs == CostTable({1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}, 6)


def test_memory_that_ends_ends_the_ladder() -> None:
    """What did fit is used; a size that was asked for and does not fit is an error."""

    def batch_s(size: int) -> float:
        if size > 4:
            raise RuntimeError("out of memory")
        return 1.0

    assert measure(batch_s, 64, auto=True).max_batch_size == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(batch_s, 64, auto=False)
