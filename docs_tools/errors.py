"""The errors of a request, with their statuses."""

from collections.abc import Iterator

from docs_tools.markdown import table
from rednet.service.errors import Cancelled, Refused, ServiceError
from rednet.service.grpc.statuses import CODES
from rednet.service.statuses import STATUS


def errors() -> str:
    """A table of all errors that clients can get."""
    rows = (
        (
            f"`{kind.code}`",
            str(status),
            CODES[status].name if status in CODES else "not used",
            "sent" if issubclass(kind, Refused) else "",
            " ".join((kind.__doc__ or "").partition("\n\n")[0].split()),
        )
        for kind, status in _statuses()
    )
    return table(("code", "HTTP", "gRPC", "`Retry-After`", "when"), rows)


def error_codes() -> set[str]:
    """The codes that clients can get."""
    return {kind.code for kind, _ in _statuses()}


def _statuses() -> Iterator[tuple[type[ServiceError], int]]:
    return ((kind, status) for kind, status in STATUS.items() if kind is not Cancelled)
