"""What all calls have in common: request id, API key, metrics, the access log, and errors as statuses."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import structlog

from rednet.service.api_keys import KeyFile
from rednet.service.errors import (
    DeadlineExceeded,
    Draining,
    Internal,
    MalformedRequest,
    Refused,
    ServiceError,
    Unauthorized,
)
from rednet.service.grpc import statuses
from rednet.service.observability import log, tracing
from rednet.service.observability.metrics import Metrics
from rednet.service.observability.tracing import Trace

logger = logging.getLogger(__name__)
requests = structlog.get_logger()

REQUEST_ID = re.compile(r"[!-~]{1,128}")  # fit for metadata, and for a line of the log
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)
CANCELLATION_S = 0.25  # gRPC reports the end of the messages before the reason for it, on a busy machine long before
CLIENT_LEFT = 499  # as over HTTP
# What the log says about a call, by OpenTelemetry's semantic conventions.
TRACED = {
    "error": "error.type",
    "grpc_status": "rpc.response.status_code",
    "request_id": "rednet.request_id",
    "images": "rednet.images",
    "batch_size": "rednet.batch_size",
}


class Call:
    """One call.

    Attributes:
        endpoint: the method's full name, such as `/inference.GRPCInferenceService/ModelInfer`.
        timeout_s: until its deadline, or the server's if that is earlier.
        has_short_deadline: whether the client gave it less time than the server would have.
    """

    def __init__(self, endpoint: str, context: Any, server_timeout_s: float) -> None:
        self.endpoint = endpoint
        self._context = context
        self.metadata: dict[str, str | bytes] = dict(context.invocation_metadata())
        given = self.metadata.get("x-request-id", "")
        self.request_id = given if isinstance(given, str) and REQUEST_ID.fullmatch(given) else log.new_id()
        self.trailers: list[tuple[str, str | bytes]] = [("x-request-id", self.request_id)]
        remaining_s = context.time_remaining()
        self.has_short_deadline = remaining_s is not None and remaining_s < server_timeout_s
        self.timeout_s: float = remaining_s if self.has_short_deadline else server_timeout_s

    async def read(self) -> bytes:
        """Receive the message. Until then, it is held back by flow control.

        Raises:
            MalformedRequest: there is none.
        """
        message: bytes | object = await self._context.read()
        if not isinstance(message, bytes):
            await asyncio.sleep(CANCELLATION_S)  # if the client has left, this is cancelled
            raise MalformedRequest("the call has no message")
        return message

    def values(self, name: str) -> Sequence[str]:
        """The text values of metadata of that name."""
        value = self.metadata.get(name)
        return [value] if isinstance(value, str) else []

    def on_done(self, function: Callable[[], None]) -> None:
        """Call a function when the response has been sent, or cannot be sent any more."""
        self._context.add_done_callback(lambda _: function())


class Calls:
    """Makes handlers for gRPC from functions that answer calls.

    Args:
        metrics: of the server.
        keys: one of which a call must carry; None: calls need no key.
        timeout_s: the server's own limit on the time of a call.
    """

    def __init__(self, metrics: Metrics, keys: KeyFile | None, timeout_s: float) -> None:
        self._metrics = metrics
        self._keys = keys
        self._timeout_s = timeout_s
        self._end: asyncio.Event | None = None
        self.held = 0  # calls held back so far

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold back new calls until the context ends, and refuse them then."""
        self._end = end = asyncio.Event()
        try:
            yield
        finally:
            end.set()

    def handler(
        self, endpoint: str, answer: Callable[[Call], Awaitable[bytes]], *, guarded: bool, probe: bool = False
    ) -> Any:
        """A handler for gRPC.

        The method is unary, but its handler reads the message as if it were a stream of one. Thus the key is checked,
        and the call is admitted, before the message is received.

        Args:
            endpoint: as metrics and the log show it.
            answer: returns the serialized response.
            guarded: whether a call needs an API key.
            probe: whether to keep calls out of traces, and of the log unless it shows everything.
        """
        level = logging.DEBUG if probe else logging.INFO

        async def handle(_: object, context: Any) -> bytes:
            call = Call(endpoint, context, self._timeout_s)
            log.begin_request(call.request_id)
            trace = tracing.begin(call.values, probe) if tracing.is_on() else None
            started = time.monotonic()
            self._metrics.request_started()
            status, code, error = 200, grpc.StatusCode.OK, None
            try:
                if self._end:
                    self.held += 1
                    await self._end.wait()
                    raise Draining
                if guarded:
                    self._check_key(call)
                reply = await answer(call)
                context.set_trailing_metadata(tuple(call.trailers))
                return reply
            except ServiceError as raised:
                error = raised
            except asyncio.CancelledError:  # the client left, or its deadline passed, which it notices by itself
                late = context.time_remaining() == 0.0
                status, code = (
                    (504, grpc.StatusCode.DEADLINE_EXCEEDED) if late else (CLIENT_LEFT, grpc.StatusCode.CANCELLED)
                )
                if late:
                    self._count(call, DeadlineExceeded(""))
                raise
            except Exception:
                logger.exception("unhandled exception")
                error = Internal()
            finally:
                if error:
                    status, code = statuses.http_status(error), statuses.code(error)
                    log.note(error=error.code)
                    self._count(call, error)
                duration_s = time.monotonic() - started
                self._metrics.request_done(endpoint, status, duration_s)
                log.note(endpoint=endpoint, status=status, grpc_status=code.name)
                log.note_ms(duration=duration_s)
                if trace:
                    _end_trace(trace, log.noted())
                requests.log(level, "request", logger=__name__)
            trailers = (*call.trailers, *statuses.trailers(error))
            await context.abort(statuses.code(error), statuses.message(error), trailers)
            raise AssertionError("unreachable: abort raises")

        return grpc.stream_unary_rpc_method_handler(handle)

    def _check_key(self, call: Call) -> None:
        if self._keys is not None:
            header = call.metadata.get("authorization", "")
            shown = BEARER.fullmatch(header) if isinstance(header, str) else None
            name = self._keys.name_of(shown[1]) if shown else None
            if name is None:
                raise Unauthorized(key_given=shown is not None)
            log.note(key=name)
            self._metrics.authenticated(name)

    def _count(self, call: Call, error: ServiceError) -> None:
        if isinstance(error, Refused):
            self._metrics.refused(error.reason if call.has_short_deadline else error.code)
        if isinstance(error, DeadlineExceeded) and call.has_short_deadline:
            self._metrics.short_deadline_exceeded()


def _end_trace(trace: Trace, noted: Mapping[str, str | float]) -> None:
    """End the trace of a call, given the values of its line in the log."""
    method = str(noted["endpoint"]).removeprefix("/")
    attributes = {name: noted[each] for each, name in TRACED.items() if each in noted}
    failed = int(noted["status"]) >= 500
    if failed:
        attributes.setdefault("error.type", noted["grpc_status"])
    trace.end(method, {"rpc.system.name": "grpc", "rpc.method": method, **attributes}, failed)
