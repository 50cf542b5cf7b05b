"""How many replicas the offered load needs. `test_ray.py` has the same in Ray Serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from rednet.service.autoscaling import OFFERED_LOAD, TARGET_LOAD, OfferedLoad, wanted_replicas
from rednet.service.engine.admission import Admission, OwnCounts, Permit
from rednet.service.errors import Overloaded


@dataclass
class Context:
    """What Ray Serve passes to a policy, as far as it is used."""

    loads: Sequence[float]
    target_num_replicas: int = 3
    aggregated_metrics: Mapping[str, Mapping[str, float]] | None = field(init=False)

    def __post_init__(self) -> None:
        self.aggregated_metrics = {OFFERED_LOAD: {f"replica-{index}": load for index, load in enumerate(self.loads)}}


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([0.0], 1),
        ([0.69], 1),
        ([0.71], 2),
        ([3.0], 5),  # one replica, which refuses two thirds of that
        ([1.0, 1.0, 1.0], 5),  # the same load, spread over three
        ([0.1, 0.1, 0.1], 1),
    ],
)
def test_replicas_follow_from_the_sum_of_offered_loads(loads: Sequence[float], wanted: int) -> None:
    """However many replicas share it."""
    assert wanted_replicas(Context(loads)) == (wanted, {})


@pytest.mark.parametrize("metrics", [None, {}, {OFFERED_LOAD: {}}, {"running_requests": {"replica-0": 9.0}}])
def test_replicas_stay_until_one_has_reported_its_load(metrics: Mapping[str, Mapping[str, float]] | None) -> None:
    """After a restart of Serve's controller, for example."""
    context = Context([])
    context.aggregated_metrics = metrics
    assert wanted_replicas(context) == (3, {})


def test_offered_load_is_the_rate_since_the_last_call() -> None:
    """Not since the start: load that has ended must not count."""
    clock, counts = [100.0], OwnCounts(offered_s=50.0)
    load = OfferedLoad(counts.total_offered_s, lambda: clock[0])
    for elapsed_s, offered_s in ((2.0, 3.0), (4.0, 1.0), (1.0, 0.0)):
        clock[0] += elapsed_s
        counts.offered_s += offered_s
        assert load.rate() == pytest.approx(offered_s / elapsed_s)
    assert load.rate() == 0.0  # no time has passed


def test_refused_images_count_so_that_replicas_suffice_for_all() -> None:
    """Three times what the device can do, with a queue that soon is full."""
    clock, counts = [0.0], OwnCounts()
    admission = Admission(8, lambda images: images * 0.01, lambda: clock[0], counts)
    load = OfferedLoad(counts.total_offered_s, lambda: clock[0])
    refused = 0
    held: list[Permit] = []
    for turn in range(3000):  # 300 images per second for ten seconds; one of three is answered
        clock[0] += 1 / 300
        if turn % 3 == 0 and held:
            held.pop(0).__exit__(None, None, None)
        try:
            permit = admission.admit(clock[0] + 1.0)
            permit.hold(1)
            held.append(permit)
        except Overloaded:
            refused += 1
    assert refused > 1900
    rate = load.rate()
    assert rate == pytest.approx(3.0, rel=0.01)
    assert wanted_replicas(Context([rate])) == (-(-3.0 // TARGET_LOAD), {})
