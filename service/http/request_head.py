"""Checks the head of a request: the rules of RFC 9112 that httptools leaves to its users, and size limits.

The limits bound the work of the header parsers, which run on the event loop.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rednet.service.errors import HeadersTooLarge, MalformedRequest, UriTooLong

MAX_HEAD_BYTES = 65_536  # the request line and all headers
MAX_HEADER_BYTES = 8_192  # name and value of one header
MAX_HEADERS = 100
MAX_TARGET_BYTES = 8_192  # path and query
MAX_PARAMETERS = 100  # in the query

# Headers that must not be repeated: a proxy and this server might each use another one of two different values.
SINGLE = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"inference-header-content-length",
        b"transfer-encoding",
        b"x-request-id",
        b"x-request-timeout-ms",
    }
)
HOST = re.compile(rb"[\w.~!$&'()*+,;=%-]*(?::\d*)?|\[[\w.:%]+\](?::\d*)?", re.ASCII)
ABSOLUTE_TARGET = re.compile(rb"https?://[^/?#]+(/[^?#]*)?(\?.*)?", re.IGNORECASE)


def oversized(name: bytes) -> HeadersTooLarge:
    """The error for a header that is too large, or that exceeds the number of headers."""
    shown = name[:64].decode("latin-1")
    return HeadersTooLarge(
        f"the header {shown} is larger than {MAX_HEADER_BYTES} bytes, or there are more than {MAX_HEADERS} headers"
    )


def check_target(target: bytes) -> None:
    """Raise `UriTooLong` if the path and query are too long, or the query has too many parameters."""
    if len(target) > MAX_TARGET_BYTES:
        raise UriTooLong(f"the path and query are longer than {MAX_TARGET_BYTES} bytes")
    if target.count(b"&") >= MAX_PARAMETERS:
        raise UriTooLong(f"the query has more than {MAX_PARAMETERS} parameters")


def check_headers(version: str, headers: Sequence[tuple[bytes, bytes]]) -> Mapping[bytes, bytes]:
    """Check all headers together, and return them by name.

    Args:
        version: of HTTP.
        headers: with names in lower case.

    Raises:
        MalformedRequest: `Host` is missing or invalid, a header is repeated that must not be, or the HTTP version or
            the transfer coding is not supported.
    """
    by_name = dict(headers)
    if len(by_name) < len(headers):
        counts = Counter(name for name, _ in headers)
        if repeated := next((name for name in counts if counts[name] > 1 and name in SINGLE), None):
            raise MalformedRequest(f"the request has more than one {repeated.decode()} header")
    host = by_name.get(b"host")
    if version == "1.1":
        if host is None:
            raise MalformedRequest("an HTTP/1.1 request needs a Host header")
    elif version != "1.0":
        raise MalformedRequest(f"HTTP/{version} is not supported; use HTTP/1.1")
    if host and not HOST.fullmatch(host):
        raise MalformedRequest("the Host header is not a valid host name or address")
    coding = by_name.get(b"transfer-encoding")
    if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
        raise MalformedRequest("the only supported Transfer-Encoding is chunked, in HTTP/1.1")
    return by_name


def origin_form(target: bytes) -> bytes:
    """The path and query of a request target. The target may also be a whole URL, as it is when sent to a proxy.

    Raises:
        MalformedRequest: the target is neither.
    """
    if target.startswith(b"/"):
        return target
    if target == b"*":
        return b"/*"  # addresses the server as a whole; no route matches
    found = ABSOLUTE_TARGET.fullmatch(target)
    if not found:
        raise MalformedRequest("the request target is neither a path nor an http URL")
    return (found[1] or b"/") + (found[2] or b"")
