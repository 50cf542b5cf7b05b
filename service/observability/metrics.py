"""Prometheus metrics. All times are in seconds."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from rednet.service.model_description import ModelBody
from rednet.service.observability import tracing
from rednet.service.observability.exemplars import LocalExemplars
from rednet.service.observability.server_processes import ServerProcessCollector

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FAMILIARITY_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)

Stage = Literal["decode", "queue", "inference", "draw", "respond"]
Reloadable = Literal["api_keys", "checkpoint"]
Outcome = Literal["ok", "failed"]


class Metrics:
    """The metrics of one server.

    Label cardinality is bounded: `endpoint` is the route template, or `unmatched`.

    In a server of several processes, `prometheus_client` keeps what each one counts in files of the folder that
    PROMETHEUS_MULTIPROC_DIR names, also after the process has ended, and a scrape of any process shows all of them.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series
        self.registry = CollectorRegistry()  # what a scrape shows
        self._exemplars: LocalExemplars | None = None  # of a server of several processes
        PlatformCollector(registry=self.registry)
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            counted = CollectorRegistry()
            sums = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
            self._exemplars = LocalExemplars(sums, LATENCY_BUCKETS)
            self.registry.register(self._exemplars)
            self.registry.register(ServerProcessCollector(os.getppid()))
        else:
            counted = self.registry
            ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=counted)
        duration = partial(Histogram, buckets=LATENCY_BUCKETS, registry=counted)

        text = "Time from the end of a request's head until the server has sent the response."
        self._requests = duration("rednet_request_duration_seconds", text, ("endpoint", "status"))
        text = "Time of one image in a stage; for the stage respond, of encoding one response."
        stages = duration("rednet_stage_duration_seconds", text, ("stage",))
        self._stages = {stage: stages.labels(stage) for stage in get_args(Stage)}
        text = "Images per batch."
        self._batch_size = Histogram("rednet_batch_size", text, buckets=BATCH_BUCKETS, registry=counted)
        text = "How familiar answered images look; 5% of familiar images are below 0.05. Empty if that is not measured."
        self._familiarity = Histogram("rednet_familiarity", text, buckets=FAMILIARITY_BUCKETS, registry=counted)
        text = "Requests in progress."
        self._inflight = Gauge("rednet_inflight_requests", text, registry=counted, multiprocess_mode="livesum")
        self._images = counter("rednet_images", "Images answered, by outcome.", ("endpoint", "outcome"))
        self._refused = counter("rednet_refused", "Requests refused before any work.", ("reason",))
        text = "Requests with a valid API key, by the name of the key."
        self._requests_by_key = counter("rednet_requests_by_key", text, ("key",))
        text = "Reloads after SIGHUP, by what was loaded again."
        reloads = counter("rednet_reloads", text, ("what", "outcome"))
        self._reloads = {  # all of them at 0: Prometheus cannot see the increase to 1 of a series that begins with 1
            (what, outcome): reloads.labels(what, outcome)
            for what in get_args(Reloadable)
            for outcome in get_args(Outcome)
        }
        text = "Requests whose own deadline passed, which was shorter than the server's timeout."
        self._short_deadlines = counter("rednet_short_deadline_exceeded", text)
        text = "Images dropped before a stage because the client had disconnected or the deadline had passed."
        self._cancelled = counter("rednet_cancelled", text, ("stage",))
        self._busy = counter("rednet_device_busy_seconds", "Time the device spent on batches.", ("device",))
        text = "Time the device was idle although an image of its next batch had arrived."
        self._starved = counter("rednet_device_starved_seconds", text, ("device",))
        self._described: ModelBody | None = None
        self.registry.register(_OnScrape(self._describe))

    def watch(
        self,
        *,
        queue_depth: Callable[[], int],
        backlog_s: Callable[[], float],
        offered_s: Callable[[], float],
        ready: Callable[[], bool],
    ) -> None:
        """Read these values on every scrape."""
        self._gauge("rednet_queue_depth", "Images accepted and not yet answered.", queue_depth)
        self._gauge("rednet_backlog_seconds", "Predicted time to process the queue.", backlog_s)
        self._gauge("rednet_ready", "1 while requests are accepted.", ready)
        text = "Predicted device time of all requested images, including refused ones. The rate is the offered load."
        self._counter("rednet_offered_seconds", text, offered_s)

    def watch_log(self, dropped: Callable[[], float]) -> None:
        """Read the number of dropped log lines on every scrape."""
        text = "Log lines dropped because they could not be written, or not fast enough."
        self._counter("rednet_log_lines_dropped", text, dropped)

    def watch_slots(self, in_use: Callable[[], float]) -> None:
        """Read the number of slots in use on every scrape."""
        text = "Images whose pixels or answer are in memory that front ends share with the engine."
        self._gauge("rednet_slots_in_use", text, in_use)

    def model(self, model: ModelBody) -> None:
        """Describe the current model, instead of the one before."""
        self._described = model

    def reloaded(self, what: Reloadable, outcome: Outcome) -> None:
        self._reloads[what, outcome].inc()

    def authenticated(self, key: str) -> None:
        """A request has an API key of that name."""
        self._requests_by_key.labels(key).inc()

    def request_started(self) -> None:
        self._inflight.inc()

    def request_done(self, endpoint: str, status: int, duration_s: float) -> None:
        self._inflight.dec()
        trace = tracing.current()
        self._requests.labels(endpoint, str(status)).observe(duration_s, trace.exemplar if trace else None)
        if trace and self._exemplars:
            labels = {"endpoint": endpoint, "status": str(status)}
            self._exemplars.observed("rednet_request_duration_seconds", labels, duration_s, trace.exemplar)

    def stage(self, stage: Stage, duration_s: float) -> None:
        """Record a stage that has just ended, also in the trace of the current request."""
        trace = tracing.current()
        self._stages[stage].observe(duration_s, trace.exemplar if trace else None)
        if trace:
            trace.stage("render" if stage == "respond" else stage, duration_s)
            if self._exemplars:
                labels = {"stage": stage}
                self._exemplars.observed("rednet_stage_duration_seconds", labels, duration_s, trace.exemplar)

    def image(self, endpoint: str, outcome: str) -> None:
        self._images.labels(endpoint, outcome).inc()

    def familiarity(self, value: float) -> None:
        """An image looks that familiar."""
        self._familiarity.observe(value)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def short_deadline_exceeded(self) -> None:
        self._short_deadlines.inc()

    def dropped(self, stage: Literal["decode", "queue"], count: int) -> None:
        self._cancelled.labels(stage).inc(count)

    def batch_done(self, queue_s: Sequence[float], inference_s: float) -> None:
        self._batch_size.observe(len(queue_s))
        waited, computed = self._stages["queue"], self._stages["inference"]
        for waited_s in queue_s:
            waited.observe(waited_s)
            computed.observe(inference_s)

    def device_seconds(self, device: str) -> tuple[Counter, Counter]:
        """The counters of the time that a device was busy, and that it was starved."""
        return self._busy.labels(device), self._starved.labels(device)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def openmetrics(self) -> bytes:
        """The same in the OpenMetrics format, which has exemplars."""
        encoded: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return encoded

    def samples(self) -> Iterable[Sample]:
        """All values that a scrape shows."""
        return (sample for metric in self.registry.collect() for sample in metric.samples)

    def _counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Register a counter whose value is read on every scrape."""
        self.registry.register(_OnScrape(lambda: [CounterMetricFamily(name, text, read())]))

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Register a gauge whose value is read on every scrape."""
        self.registry.register(_OnScrape(lambda: [GaugeMetricFamily(name, text, read())]))

    def _describe(self) -> Iterable[Metric]:
        """The metrics of the current model. It changes with a reload, and gauges in files cannot forget old labels."""
        model = self._described
        if model is None:
            return
        info = GaugeMetricFamily(
            "rednet_model_info",
            "Always 1; the labels describe the model. checkpoint: the first digits of the file's SHA-256.",
            labels=("name", "architecture", "device", "precision", "checkpoint"),
        )
        info.add_metric((model.name, model.architecture, model.device, model.precision, model.checkpoint_digits()), 1)
        yield info
        text = "Relative deviation of the backend from the reference output in the self-check at start."
        yield GaugeMetricFamily("rednet_selfcheck_deviation_ratio", text, model.deviation)


class _OnScrape(Collector):
    """Metrics whose values are read on every scrape."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class DeviceEvents:
    """Records the `EngineEvents` of one device."""

    def __init__(self, metrics: Metrics, device: str) -> None:
        self._metrics = metrics
        self._busy, self._starved = metrics.device_seconds(device)

    def batch_done(self, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        self._metrics.batch_done(queue_s, inference_s)
        self._busy.inc(inference_s)
        self._starved.inc(starved_s)

    def dropped(self, stage: Literal["queue"], count: int) -> None:
        self._metrics.dropped(stage, count)
