"""Exemplars where metrics are added up over several processes, for which `prometheus_client` has none."""

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class LocalExemplars(Collector):
    """Adds the exemplars of this process to the histograms of all processes. Each scrape reaches one of them.

    Args:
        sums: collects the metrics of all processes.
        buckets: upper bounds of the histograms that have exemplars.
    """

    def __init__(self, sums: Collector, buckets: Sequence[float]) -> None:
        self._sums = sums
        self._buckets = buckets
        self._bounds = [floatToGoString(bound) for bound in (*buckets, float("inf"))]  # type: ignore[no-untyped-call]
        self._latest: dict[tuple[str, frozenset[tuple[str, str]]], Exemplar] = {}

    def observed(self, histogram: str, labels: Mapping[str, str], value: float, exemplar: Mapping[str, str]) -> None:
        """Keep the exemplar of a value that a histogram has observed."""
        bound = self._bounds[bisect_left(self._buckets, value)]
        key = f"{histogram}_bucket", frozenset((*labels.items(), ("le", bound)))
        self._latest[key] = Exemplar(dict(exemplar), value, time.time())

    def collect(self) -> Iterable[Metric]:
        for metric in self._sums.collect():
            if metric.type == "histogram" and self._latest:
                metric.samples = [
                    sample._replace(exemplar=self._latest.get((sample.name, frozenset(sample.labels.items()))))
                    for sample in metric.samples
                ]
            yield metric
