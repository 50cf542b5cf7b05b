"""The table of measured batch times."""

import pytest

from rednet.service.cost_table import CostTable, measure


def test_cost_is_interpolated_between_sizes_and_extrapolated_beyond() -> None:
    """Time is linear between two measured sizes and proportional beyond the largest. Zero images take no time."""
    costs = CostTable({1: 1.0, 4: 2.5, 8: 4.0}, max_batch_size=8)
    assert [costs.batch_s(n) for n in (0, 1, 3, 4, 6, 8, 16)] == [0.0, 1.0, 2.0, 2.5, 3.25, 4.0, 8.0]


def test_cost_of_a_queue_is_that_of_full_batches_and_a_remainder() -> None:
    """21 images in batches of 8 are 8, 8 and 5."""
    costs = CostTable({1: 1.0, 4: 2.5, 8: 4.0}, max_batch_size=8)
    assert costs.queue_s(21) == 4.0 + 4.0 + costs.batch_s(5)


def test_empty_cost_table_predicts_no_time() -> None:
    """A table without entries predicts zero instead of failing."""
    assert CostTable().queue_s(100) == 0.0


@pytest.mark.parametrize(
    ("per_image", "best"),
    [
        ({}, 1),  # larger batches are not faster
        ({2: 0.5}, 2),  # two cores: one image each
        ({2: 0.85, 4: 0.7, 8: 0.5, 16: 0.49}, 8),
        ({2: 0.85, 4: 0.7, 8: 0.6, 16: 0.5, 32: 0.4, 64: 0.3}, 64),
    ],
)
def test_best_batch_size_stops_when_doubling_gains_little(per_image: dict[int, float], best: int) -> None:
    """The smallest size is chosen whose double gains less than a twentieth, and measuring stops soon after."""
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


def test_automatic_batch_size_is_at_least_the_minimum() -> None:
    """It applies even if larger batches gain little. If the minimum does not fit into memory, the largest size that
    fits is used."""
    assert measure(float, 64, auto=True, min_size=3).max_batch_size == 3
    assert measure(float, 2, auto=True, min_size=3).max_batch_size == 2
    assert measure(lambda size: size * (0.5 if size == 8 else 1.0), 64, auto=True, min_size=4).max_batch_size == 8


def test_configured_batch_size_is_kept() -> None:
    """It is kept even if it gains nothing, and smaller sizes are measured, too."""
    costs = measure(lambda _: 1.0, 6, auto=False)
    assert costs == CostTable({1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}, 6)


def test_measuring_stops_when_memory_is_exhausted() -> None:
    """The sizes that fit are used. A configured size that does not fit is an error."""

    def batch_s(size: int) -> float:
        if size > 4:
            raise RuntimeError("out of memory")
        return 1.0

    assert measure(batch_s, 64, auto=True).max_batch_size == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(batch_s, 64, auto=False)
