"""Traces of requests, by OpenTelemetry's SDK, which is an extra. Its standard OTEL_* variables configure everything.

While tracing is off, the SDK is not imported, and a request costs a few checks.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import Any

from rednet import __version__
from rednet.service.observability import log

logger = logging.getLogger(__name__)

SERVICE_NAME = "rednet-serve"  # unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another one
OTLP_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # by OTEL_EXPORTER_OTLP_PROTOCOL
FLUSH_S = 1.0  # how long the end of the server waits for the last spans to be exported
MAX_SPANS_PER_STAGE = 16  # in one request: a thousand images would fill the export queue, at the cost of other requests
REPEAT_S = 60.0  # how long a warning about exports is not repeated

Values = Callable[[str], Sequence[str]]  # the values of a header of the request, by its name in lower case


class Trace:
    """The trace of one request that is recorded.

    Wall-clock time is read once, so that spans are in order even if the clock is set meanwhile.

    Attributes:
        exemplar: labels that link a measured value to this trace.
    """

    def __init__(self, tracer: "_Tracer", span: Any, began_ns: int) -> None:
        self._tracer, self._span = tracer, span
        self._offset_ns = began_ns - time.monotonic_ns()
        self._context = tracer.context_of(span)
        self._stages: Counter[str] = Counter()
        ids = span.get_span_context()
        self.exemplar = {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"}

    def stage(
        self, name: str, duration_s: float, ended_s_ago: float = 0.0, attributes: Mapping[str, int] | None = None
    ) -> None:
        """Add a span for a stage that has ended.

        Args:
            name: of the stage.
            duration_s: how long it took.
            ended_s_ago: how long ago it ended.
            attributes: of the span.
        """
        self._stages[name] += 1
        if self._stages[name] > MAX_SPANS_PER_STAGE:
            return
        end_ns = self._now_ns() - int(1e9 * ended_s_ago)
        start_ns = end_ns - int(1e9 * duration_s)
        span = self._tracer.otel.start_span(name, self._context, attributes=attributes, start_time=start_ns)
        span.end(end_ns)

    def end(self, name: str, attributes: Mapping[str, str | float], failed: bool) -> None:
        """End the span of the request.

        Args:
            name: of the span.
            attributes: of the span.
            failed: whether the server is at fault.
        """
        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if failed:
            self._span.set_status(self._tracer.error)
        self._span.end(self._now_ns())

    def _now_ns(self) -> int:
        return time.monotonic_ns() + self._offset_ns


class _Tracer:
    """OpenTelemetry, as the environment configures it.

    Raises:
        ImportError: the extra is not installed.
        LookupError, RuntimeError, ValueError: the environment asks for what does not exist.
    """

    def __init__(self, exporters: Sequence[str]) -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        resource = Resource({"service.version": __version__}).merge(Resource.create())
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the SDK's own default
            resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        quiet = _NoRepeats()
        logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(quiet)
        for exporter in [_exporter_class(name)() for name in exporters]:
            logging.getLogger(type(exporter).__module__).addFilter(quiet)
            self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.otel = self.provider.get_tracer("rednet.service", __version__)
        self.context_of, self.error = trace.set_span_in_context, trace.Status(trace.StatusCode.ERROR)
        self._server, self._extract = trace.SpanKind.SERVER, propagate.get_global_textmap().extract

    def start(self, values: Values) -> tuple[Any, int]:
        """Start the span of a request, and return when that was. The sampler decides whether it is recorded."""
        began_ns = time.time_ns()
        context = self._extract(values, getter=_Headers)
        return self.otel.start_span("request", context, self._server, start_time=began_ns), began_ns


class _Headers:
    """Reads the context of the caller from headers, for OpenTelemetry's propagators."""

    @staticmethod
    def get(carrier: Values, key: str) -> list[str] | None:
        return list(carrier(key)) or None

    @staticmethod
    def keys(_: Values) -> list[str]:
        return []  # nothing asks for the names of all headers


class _NoRepeats(logging.Filter):
    """Drops messages that were logged in the last minute: a collector that is down would repeat them all the time."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._logged.get(record.msg, -REPEAT_S) < REPEAT_S:
            return False
        self._logged[record.msg] = now
        return True


_tracer: _Tracer | None = None
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def configure() -> None:
    """Trace requests from now on, if OTEL_* variables ask for it.

    If they cannot be obeyed, the reason is logged, and nothing is traced: such variables are often set for many
    programs at once, and a server without traces is better than none.
    """
    global _tracer  # noqa: PLW0603  (one for the process, as for logs)
    names = exporter_names(os.environ)
    if not names:
        return
    try:
        _tracer = _Tracer(names)
    except ImportError as error:
        remedy = "install 'rednet-serve[otel]', or set OTEL_SDK_DISABLED=true"
        logger.warning("requests are not traced, although OTEL_* variables ask for it: %s; %s", error, remedy)
    except (LookupError, RuntimeError, ValueError) as error:
        logger.warning("requests are not traced: %s", error)
    else:
        logger.info("tracing requests; exporting to %s", ", ".join(names))


def exporter_names(environment: Mapping[str, str]) -> list[str]:
    """The exporters that the environment asks for. By default there are none, although the specification has OTLP to
    localhost: a server that nobody configured must not try to connect to anything."""

    def value(*names: str) -> str:
        return next((found for name in names if (found := environment.get(name, "").strip())), "")

    if value("OTEL_SDK_DISABLED").lower() == "true":
        return []
    has_endpoint = value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    asked = value("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none")
    names = [name.strip() for name in asked.split(",")]
    protocol = value("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    otlp = OTLP_EXPORTERS.get(protocol, f"otlp with the protocol {protocol}")
    return [otlp if name == "otlp" else name for name in names if name != "none"]


def _exporter_class(name: str) -> Any:
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        return found.load()
    raise LookupError(f"no package here exports traces to {name!r}; rednet-serve[otel] exports them by http/protobuf")


def close() -> None:
    """Stop tracing, and wait for the last spans to be exported, but not for long: the collector may be down."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer:
        flushing = threading.Thread(target=tracer.provider.shutdown, name="flush-traces", daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
        if flushing.is_alive():
            logger.warning("the last spans could not be exported within %g s", FLUSH_S)


def is_on() -> bool:
    """Whether requests are traced."""
    return _tracer is not None


def begin(values: Values, probe: bool = False) -> Trace | None:
    """Begin the trace of a request, or continue its caller's, and add its ids to the lines that the request logs.

    Args:
        values: of the request's headers.
        probe: whether the request is a probe or a scrape, which is not traced.

    Returns:
        None if the request is not recorded.
    """
    assert _tracer, "tracing is off"
    trace = None
    if not probe:
        span, began_ns = _tracer.start(values)
        ids = span.get_span_context()
        log.note(trace_id=f"{ids.trace_id:032x}", span_id=f"{ids.span_id:016x}", trace_flags=f"{ids.trace_flags:02x}")
        if ids.trace_flags.sampled:
            trace = Trace(_tracer, span, began_ns)
    _current.set(trace)  # a pipelined request begins in the context of the one before it
    return trace


def current() -> Trace | None:
    """The trace of the current request; None if it is not recorded."""
    return _current.get()


def inference(queue_s: float, inference_s: float, batch_size: int) -> None:
    """Add spans for the queue and the inference to the current trace, if there is one. The inference has just ended."""
    if trace := _current.get():
        trace.stage("queue", queue_s, ended_s_ago=inference_s)
        trace.stage("inference", inference_s, attributes={"rednet.batch_size": batch_size})
