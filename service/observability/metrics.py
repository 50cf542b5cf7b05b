"""What Prometheus sees. All times in seconds."""

from collections.abc import Callable, Iterable, Sequence
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
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from rednet.service.model_description import ModelBody
from rednet.service.types import EngineClient, State

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Stage = Literal["decode", "queue", "inference", "draw", "respond"]


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every first one, which nobody asked for
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Histogram(
            "rednet_request_duration_seconds",
            "Time from the end of a request's head to the end of its answer, as far as the server sends it.",
            ("endpoint", "status"),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        stages = Histogram(
            "rednet_stage_duration_seconds",
            "Time of one image in one stage; respond: of one answer being encoded.",
            ("stage",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in get_args(Stage)}
        self._batch_size = Histogram(
            "rednet_batch_size", "Images in a batch that ran.", buckets=BATCH_BUCKETS, registry=registry
        )
        self._queue_depth = Gauge("rednet_queue_depth", "Images accepted and not yet answered.", registry=registry)
        self._inflight = Gauge("rednet_inflight_requests", "Requests being worked on.", registry=registry)
        self._backlog = Gauge("rednet_backlog_seconds", "Predicted time to work off the queue.", registry=registry)
        self._images = Counter(
            "rednet_images", "Images answered, by what came of them.", ("endpoint", "outcome"), registry=registry
        )
        self._refused = Counter("rednet_refused", "Requests refused before any work.", ("reason",), registry=registry)
        self._short_deadlines = Counter(
            "rednet_short_deadline_exceeded",
            "Requests answered 504 whose own deadline, by X-Request-Timeout-Ms, was shorter than the server's.",
            registry=registry,
        )
        self._cancelled = Counter(
            "rednet_cancelled",
            "Images not decoded, or not run, because their caller had left or their deadline had passed, by stage.",
            ("stage",),
            registry=registry,
        )
        self._busy = Counter("rednet_device_busy_seconds", "Time spent on batches.", ("device",), registry=registry)
        self._starved = Counter(
            "rednet_device_starved_seconds",
            "Time with nothing to do although an image of the next batch was there.",
            ("device",),
            registry=registry,
        )
        self._ready = Gauge("rednet_ready", "1 while requests are taken.", registry=registry)
        self._model = Gauge(
            "rednet_model_info",
            "1; the labels say what is served.",
            ("name", "architecture", "device", "precision"),
            registry=registry,
        )
        self._deviation = Gauge(
            "rednet_selfcheck_deviation_ratio",
            "Relative distance from the plain network's answers, by the check at start.",
            registry=registry,
        )

    def watch(self, client: EngineClient, state: Callable[[], State]) -> None:
        """Read the gauges from the client whenever they are scraped."""
        self._queue_depth.set_function(lambda: client.queue_depth)
        self._backlog.set_function(lambda: client.backlog_s)
        self._ready.set_function(lambda: state() is State.READY)
        text = "Predicted device time of all images that were asked for, refused ones included. Its rate is the load."
        self.registry.register(_Observed("rednet_offered_seconds", text, lambda: client.offered_s))

    def watch_log(self, dropped: Callable[[], int]) -> None:
        """Read how many log lines were dropped whenever that is scraped."""
        text = "Log lines that were not written: nothing read them, or writing failed."
        self.registry.register(_Observed("rednet_log_lines_dropped", text, dropped))

    def model(self, model: ModelBody) -> None:
        self._model.labels(model.name, model.architecture, model.device, model.precision).set(1)
        self._deviation.set(model.deviation)

    def request_started(self) -> None:
        self._inflight.inc()

    def request_done(self, endpoint: str, status: int, duration_s: float) -> None:
        self._inflight.dec()
        self._requests.labels(endpoint, str(status)).observe(duration_s)

    def stage(self, stage: Stage, duration_s: float) -> None:
        self._stages[stage].observe(duration_s)

    def image(self, endpoint: str, outcome: str) -> None:
        self._images.labels(endpoint, outcome).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def short_deadline_exceeded(self) -> None:
        self._short_deadlines.inc()

    def dropped(self, stage: Literal["decode", "queue"], count: int) -> None:
        self._cancelled.labels(stage).inc(count)

    def batch_done(self, device: str, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        self._batch_size.observe(len(queue_s))
        for waited_s in queue_s:
            self.stage("queue", waited_s)
            self.stage("inference", inference_s)
        self._busy.labels(device).inc(inference_s)
        self._starved.labels(device).inc(starved_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Observed(Collector):
    """A counter whose value is read when it is scraped."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, self._read())


class DeviceEvents:
    """The `EngineEvents` of one device."""

    def __init__(self, metrics: Metrics, device: str) -> None:
        self._metrics, self._device = metrics, device

    def batch_done(self, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        self._metrics.batch_done(self._device, queue_s, inference_s, starved_s)

    def dropped(self, stage: Literal["queue"], count: int) -> None:
        self._metrics.dropped(stage, count)
