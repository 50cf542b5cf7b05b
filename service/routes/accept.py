"""What a caller would like to get, by the `Accept` header."""

import re

QUALITY = re.compile(r"q=(\d(?:\.\d{0,3})?)")


def prefers(accept: str, media_type: str, usual: str) -> bool:
    """Whether the header names a type, and wants it no less than the one sent usually (RFC 9110, section 12.5.1)."""
    qualities: dict[str, float] = {}
    for entry in accept.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        given = [float(found[1]) for parameter in parameters if (found := QUALITY.fullmatch(parameter))]
        qualities[name] = given[0] if given else 1.0
    wanted = qualities.get(media_type, 0.0)
    return wanted > 0 and wanted >= qualities.get(usual, 0.0)
