"""Errors as gRPC statuses, with details for programs in the trailers.

`grpc-status-details-bin` holds `google.rpc.ErrorInfo`, whose reason is the error's code in capitals. Errors that a
retry can overcome also have `google.rpc.RetryInfo`; `retry-after`, as over HTTP; and `grpc-retry-pushback-ms`, which
the retry policies of gRPC's own clients obey.
"""

import math
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from rednet.service.errors import NotFound, Refused, ServiceError
from rednet.service.statuses import STATUS

DOMAIN = "rednet-serve"  # of the reasons
MAX_MESSAGE_CHARS = 1000  # trailers are limited to 8 kB, and the message is in them twice

CODES = {  # by HTTP status
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,  # not RESOURCE_EXHAUSTED, which means that a retry may help
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class UnknownMethod(NotFound):
    """The server has no such method."""


def http_status(error: ServiceError) -> int:
    """The status that the error has over HTTP, by which metrics and the log go."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def code(error: ServiceError) -> Any:
    """The gRPC status code of an error."""
    return grpc.StatusCode.UNIMPLEMENTED if isinstance(error, UnknownMethod) else CODES[http_status(error)]


def message(error: ServiceError) -> str:
    return error.message[:MAX_MESSAGE_CHARS]


def trailers(error: ServiceError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of an error."""
    details = [ErrorInfo(reason=error.code.upper(), domain=DOMAIN)]
    hints: tuple[tuple[str, str | bytes], ...] = ()
    if isinstance(error, Refused):
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * error.retry_after_s))
        details.append(retry)
        hints = (
            ("retry-after", str(math.ceil(error.retry_after_s))),
            ("grpc-retry-pushback-ms", str(round(1000 * error.retry_after_s))),
        )
    status = Status(code=code(error).value[0], message=message(error), details=map(_packed, details))
    return (("grpc-status-details-bin", status.SerializeToString()), *hints)


def _packed(detail: Any) -> Any:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
