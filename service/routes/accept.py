"""What a caller would like to get, by the `Accept` header."""

import re

QUALITY = re.compile(r"q=(\d(?:\.\d{0,3})?)")


def prefers(accept: str, media_type: str, usual: str) -> bool:
    """Whether the header names a type, and wants it no less than the one sent usually (RFC 9110, section 12.5.1).

    Args:
        accept: the header.
        media_type: for which it is not enough that anything is welcome.
        usual: the other one.
    """
    qualities: dict[str, float] = {}
    for entry in accept.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        given = [float(found[1]) for parameter in parameters if (found := QUALITY.fullmatch(parameter))]
        qualities[name] = given[0] if given else 1.0
    wanted = qualities.get(media_type, 0.0)
    ranges = (usual, f"{usual.split('/', maxsplit=1)[0]}/*", "*/*")  # the narrowest that is there counts
    return wanted > 0 and wanted >= next((qualities[each] for each in ranges if each in qualities), 0.0)
