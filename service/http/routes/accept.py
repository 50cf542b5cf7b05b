"""Content negotiation by the `Accept` header."""

import re

from fastapi import Request

from rednet.service.errors import NotAcceptable

QUALITY = re.compile(r"(?:^|;)\s*q=(\d(?:\.\d{0,3})?)\s*(?:;|$)")


def prefers(accept: str, media_type: str, usual: str) -> bool:
    """Whether a client prefers a media type to the default, or likes both equally (RFC 9110, section 12.5.1).

    Args:
        accept: value of the header.
        media_type: must be named explicitly; a wildcard is not enough.
        usual: the default type.
    """
    ranges = (usual, f"{usual.split('/', maxsplit=1)[0]}/*", "*/*")  # the most specific one in the header counts
    relevant = {media_type, *ranges}
    qualities: dict[str, float] = {}
    for entry in accept.lower().split(","):
        name, _, parameters = entry.partition(";")
        if (name := name.strip()) in relevant:  # a hostile header may have thousands of other entries
            qualities[name] = _quality(parameters)
    wanted = qualities.get(media_type, 0.0)
    return wanted > 0 and wanted >= next((qualities[each] for each in ranges if each in qualities), 0.0)


def check_accept(request: Request, *media_types: str) -> None:
    """Refuse a request whose response would have a type that the client does not accept.

    Args:
        request: its body has not been read.
        media_types: in which the response can be.

    Raises:
        NotAcceptable: the `Accept` header excludes all of them.
    """
    accept = request.headers.get("accept", "*/*")
    if accept == "*/*":
        return
    qualities = {}
    for entry in accept.lower().split(","):
        name, _, parameters = entry.partition(";")
        qualities[name.strip()] = _quality(parameters)
    for media_type in media_types:
        ranges = (media_type, f"{media_type.split('/', maxsplit=1)[0]}/*", "*/*")
        if next((qualities[each] for each in ranges if each in qualities), 0.0) > 0:
            return
    raise NotAcceptable(f"Accept: the response can only be {' or '.join(media_types)}")


def _quality(parameters: str) -> float:
    found = QUALITY.search(parameters)
    return float(found[1]) if found else 1.0
