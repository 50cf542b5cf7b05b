"""The number of replicas that the offered load needs. Knows no orchestrator: Ray Serve calls it through `ray.py`."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

OFFERED_LOAD = "offered_load"  # device seconds that were asked for per second: 1.0 keeps one replica fully busy
# Replicas are added beyond this load. The rest is for bursts, and for the time until a new replica is ready.
TARGET_LOAD = 0.7


class OfferedLoad:
    """The rate of `rednet_offered_seconds_total`.

    Args:
        total_s: the counter.
        clock: returns the time, in seconds.
    """

    def __init__(self, total_s: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._total_s, self._clock = total_s, clock
        self._since, self._before_s = clock(), total_s()

    def rate(self) -> float:
        """The offered load since the last call."""
        now, total_s = self._clock(), self._total_s()
        elapsed_s, offered_s = now - self._since, total_s - self._before_s
        self._since, self._before_s = now, total_s
        return offered_s / elapsed_s if elapsed_s > 0 else 0.0


class ScalingContext(Protocol):
    """What is used of Ray Serve's `AutoscalingContext`."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By name, what each replica has reported, averaged over the look-back period."""

    @property
    def target_num_replicas(self) -> int:
        """The number that was decided before."""


def wanted_replicas(context: ScalingContext) -> tuple[int, dict[str, Any]]:
    """An autoscaling policy of Ray Serve: enough replicas that each has `TARGET_LOAD`.

    What is refused counts as offered: so the number of replicas follows from the load alone, however much of it they
    can answer. Serve applies its bounds and delays to the result.

    Args:
        context: the state of the deployment.

    Returns:
        The number of replicas, and an empty state, as the decision does not depend on earlier ones.
    """
    loads = (context.aggregated_metrics or {}).get(OFFERED_LOAD)
    if not loads:  # no replica has reported yet
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(loads.values()) / TARGET_LOAD)), {}
