"""`process_*` metrics of a server of several processes: the sums over the supervisor and its children."""

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
CHILDREN_TIMES = slice(13, 15)  # in /proc/PID/stat behind the name: CPU time of children that have ended


class ServerProcessCollector(Collector):
    """Collects what `ProcessCollector` collects, for all processes together. Decoders are not included, as usual.

    Args:
        supervisor: the process id of the parent of all others.
    """

    def __init__(self, supervisor: int) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        values: dict[str, list[float]] = defaultdict(list)
        metrics: dict[str, Metric] = {}
        for pid in (self._supervisor, *_children(self._supervisor)):
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                metrics[metric.name] = metric
                values[metric.name] += [sample.value for sample in metric.samples]
        # Otherwise the counter would go back whenever a process is replaced.
        values["process_cpu_seconds"].append(_ended_children_cpu_s(self._supervisor))
        for name, metric in metrics.items():
            combine = min if name == "process_start_time_seconds" else sum
            metric.samples = [sample._replace(value=combine(values[name])) for sample in metric.samples]
        return metrics.values()


def _children(pid: int) -> Iterable[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _ended_children_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[CHILDREN_TIMES])) * TICK_S
