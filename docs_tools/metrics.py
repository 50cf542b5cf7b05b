"""The metrics of a server."""

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from docs_tools.markdown import plain, table
from rednet.service.model_description import ModelBody
from rednet.service.observability.gpus import GpuCollector
from rednet.service.observability.metrics import Metrics

MODEL: dict[str, Any] = {"name": "", "architecture": "", "device": "", "precision": "", "deviation": 0.0}


def metrics() -> str:
    """A table of the metrics whose names begin with `rednet_`."""
    rows = (
        (f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), plain(text))
        for name, kind, labels, text in _described()
    )
    return table(("metric", "type", "labels", "meaning"), rows)


def metric_names() -> set[str]:
    """The names of all series, including those of histograms."""
    described = list(_described())
    parts = {
        name + part for name, kind, *_ in described if kind == "histogram" for part in ("_bucket", "_count", "_sum")
    }
    return {name for name, *_ in described} | parts


def _described() -> Iterator[tuple[str, str, Sequence[str], str]]:
    """Name, type, labels and help text of each metric."""
    observed = Metrics()
    observed.watch(queue_depth=lambda: 0, backlog_s=lambda: 0.0, offered_s=lambda: 0.0, ready=lambda: True)
    observed.watch_log(lambda: 0.0)
    observed.watch_slots(lambda: 0.0)
    observed.model(ModelBody.model_construct(**MODEL))
    observed.registry.register(GpuCollector({}))
    found = {}
    for collector in observed.registry._collector_to_names:
        for metric in collector.collect():
            labels = collector._labelnames if isinstance(collector, MetricWrapperBase) else _labels(metric)
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            found[name] = (name, metric.type, labels, metric.documentation)
    return (each for name, each in sorted(found.items()) if name.startswith("rednet_"))


def _labels(metric: Metric) -> Sequence[str]:
    labels: Sequence[str] = getattr(metric, "_labelnames", ())
    return labels or [name for sample in metric.samples[:1] for name in sample.labels]
