"""What can go wrong with a request. Codes are stable and part of the contract; HTTP statuses are not known here."""

from typing import ClassVar, Self


class ServiceError(Exception):
    """Base of all of them; the message is meant for the caller."""

    code: ClassVar[str]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def with_message(self, message: str) -> Self:
        """A copy with another message. The error itself may be shared, and must not change."""
        error = type(self).__new__(type(self))
        error.__dict__.update(self.__dict__, message=message)
        error.args = (message,)
        return error


class MalformedRequest(ServiceError):
    """The body or a parameter cannot be understood."""

    code = "malformed_request"


class UriTooLong(ServiceError):
    """The request target is longer than any that the server has an answer for."""

    code = "uri_too_long"


class HeadersTooLarge(ServiceError):
    """One header, or the request's head as a whole, is too large."""

    code = "headers_too_large"


class RequestTimeout(ServiceError):
    """The request's body did not arrive in time."""

    code = "request_timeout"


class Unauthorized(ServiceError):
    """The caller has shown no key of the server's."""

    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("this server wants an API key: Authorization: Bearer <key>")


class NotFound(ServiceError):
    """There is nothing of that name."""

    code = "not_found"


class PayloadTooLarge(ServiceError):
    """More bytes, pixels or images than the server takes."""

    code = "payload_too_large"


class UnsupportedMediaType(ServiceError):
    """Not an image, or of a format that is not served."""

    code = "unsupported_media_type"


class UnreadableImage(ServiceError):
    """The format is known, the data is broken."""

    code = "unreadable_image"


class NumericalOverflow(ServiceError):
    """The network's numbers overflow on this image: what it computes is infinite or not a number."""

    code = "numerical_overflow"

    def __init__(self) -> None:
        super().__init__("the network's answer for this image is not finite: its values overflow")


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed before there was an answer."""

    code = "deadline_exceeded"


class Internal(ServiceError):
    """A defect of the server. The log says what happened; the answer does not."""

    code = "internal"

    def __init__(self, message: str = "an internal error; the server's log has the details") -> None:
        super().__init__(message)


class Refused(ServiceError):
    """The server takes no work right now.

    Attributes:
        retry_after_s: when it is worth trying again.
        reason: why, as a label of `rednet_refused_total`.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = self.code


class Overloaded(Refused):
    """There is no capacity now: the queue, slow decoding or memory is full, or the answer would come too late."""

    code = "overloaded"

    def for_short_deadline(self) -> Self:
        """This error, counted as the fault of a deadline that even an idle server would miss."""
        self.reason = "short_deadline"
        return self


class NotReady(Refused):
    """The model is still being loaded and warmed up."""

    code = "not_ready"


class DecoderUnavailable(Refused):
    """No decoder process can finish the image right now, which is not the image's fault."""

    code = "decoder_unavailable"

    def __init__(self, message: str = "no image decoder is available; try again later") -> None:
        super().__init__(message, retry_after_s=1.0)


class DeviceFailed(Refused):
    """The device hangs or has failed. This process ends; another server, or its successor, answers."""

    code = "device_failed"

    def __init__(self) -> None:
        super().__init__("the device has failed; the server is about to restart", retry_after_s=5.0)


class Draining(Refused):
    """The server is about to stop."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("the server is stopping", retry_after_s=5.0)


def error_body(error: ServiceError) -> dict[str, dict[str, str]]:
    """An error as JSON, the same in `/v1` responses and on the command line."""
    return {"error": {"code": error.code, "message": error.message}}
