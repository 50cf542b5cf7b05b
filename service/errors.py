"""The errors of a request. Codes are stable and part of the API; `statuses.py` maps errors to statuses."""

from typing import ClassVar, Self


class ServiceError(Exception):
    """Base class of all errors. The message is sent to the client."""

    code: ClassVar[str]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def with_message(self, message: str) -> Self:
        """A copy with another message. Errors may be shared and must not be modified."""
        error = type(self).__new__(type(self))
        error.__dict__.update(self.__dict__, message=message)
        error.args = (message,)
        return error


class MalformedRequest(ServiceError):
    """The body, a parameter or a header is invalid, a parameter is unknown, or an image has no bytes."""

    code = "malformed_request"


class UriTooLong(ServiceError):
    """Path and query are too long, or the query has too many parameters."""

    code = "uri_too_long"


class HeadersTooLarge(ServiceError):
    """A header is too large, there are too many, or they are too large together."""

    code = "headers_too_large"


class NotAcceptable(ServiceError):
    """The `Accept` header excludes every type that the response can have."""

    code = "not_acceptable"


class RequestTimeout(ServiceError):
    """The body did not arrive in time. The connection is closed."""

    code = "request_timeout"


class Unauthorized(ServiceError):
    """The server requires an API key, and the request has no valid one."""

    code = "unauthorized"

    def __init__(self, key_given: bool) -> None:
        missing = "this server requires an API key: Authorization: Bearer <key>"
        super().__init__("the API key is not valid" if key_given else missing)


class NotFound(ServiceError):
    """There is no such path, or no model or version of that name."""

    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"


class PayloadTooLarge(ServiceError):
    """The request has more bytes, pixels or images than the server accepts."""

    code = "payload_too_large"


class UnsupportedMediaType(ServiceError):
    """The data is not an image, its format or variant is not supported, or the body is compressed."""

    code = "unsupported_media_type"


class UnreadableImage(ServiceError):
    """The format is supported, but the data is damaged."""

    code = "unreadable_image"


class NumericalOverflow(ServiceError):
    """The network's activations overflow on this image, so that its outputs are infinite or NaN."""

    code = "numerical_overflow"

    def __init__(self) -> None:
        super().__init__("the network's output for this image is not finite: its activations overflow")


class DeadlineExceeded(ServiceError):
    """The deadline of the request, its own or the server's, passed before it was answered."""

    code = "deadline_exceeded"


class Cancelled(ServiceError):
    """The client disconnected before the image ran. Nothing is sent."""

    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("the image was cancelled")


class Internal(ServiceError):
    """An unexpected error in the server. The details are in the log and not in the response."""

    code = "internal"

    def __init__(self, message: str = "an internal error; the server's log has the details") -> None:
        super().__init__(message)


class Refused(ServiceError):
    """The server does not accept the request now.

    Attributes:
        retry_after_s: time after which the client should try again.
        reason: label value for `rednet_refused_total`.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = self.code


class Overloaded(Refused):
    """The queue is full, too many large images or bodies are waiting, or the response would come after the deadline."""

    code = "overloaded"

    def for_short_deadline(self) -> Self:
        """This error, counted under another reason: even an idle server would miss the deadline."""
        self.reason = "short_deadline"
        return self


class NotReady(Refused):
    """The model is still being loaded and warmed up."""

    code = "not_ready"


class DecoderUnavailable(Refused):
    """No decoder process can decode the image now. The image is not the cause."""

    code = "decoder_unavailable"

    def __init__(self, message: str = "no image decoder is available; try again later") -> None:
        super().__init__(message, retry_after_s=1.0)


class DeviceFailed(Refused):
    """The device hangs or has failed, and the server is about to restart."""

    code = "device_failed"

    def __init__(self) -> None:
        super().__init__("the device has failed; the server is about to restart", retry_after_s=5.0)


class Draining(Refused):
    """The server is shutting down."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("the server is stopping", retry_after_s=5.0)


def error_body(error: ServiceError) -> dict[str, dict[str, str]]:
    """An error as JSON, the same in `/v1` responses and on the command line."""
    return {"error": {"code": error.code, "message": error.message}}
