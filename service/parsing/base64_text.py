"""Decodes base64 text in all the variants that libraries write by default."""

import binascii
import re

from rednet.service.errors import MalformedRequest

URL_SAFE = bytes.maketrans(b"-_", b"+/")
STRANGE = re.compile(r"[^A-Za-z0-9+/=_\s-]")
MAX_DATA_URL_HEAD = 1_000  # bytes before the comma of a data URL


def decode_base64(text: str | bytes) -> bytes | MalformedRequest:
    """Decode base64 text (RFC 4648); returns the error if that is not possible.

    Data URLs, line breaks (MIME, Android, `base64 FILE`), surrounding white space, missing padding and the URL-safe
    alphabet are accepted. Anything else is an error: if characters were skipped, damaged text could pass as an image.
    """
    try:
        return binascii.a2b_base64(text, strict_mode=True)  # the usual case, in one pass
    except ValueError:
        pass
    try:
        return _decode_variant((text.encode("ascii") if isinstance(text, str) else text).strip())
    except MalformedRequest as error:
        return error
    except ValueError:
        return MalformedRequest(f"not base64{_first_strange_character(text)}")


def _first_strange_character(text: str | bytes) -> str:
    found = STRANGE.search(text if isinstance(text, str) else text.decode("latin-1"))
    return f": it contains {found[0]!r}" if found else ""


def _decode_variant(text: bytes) -> bytes:
    if text[:8].lower().startswith((b"http://", b"https://")):
        raise MalformedRequest("a URL instead of base64: the server does not fetch images")
    if text[:5].lower() == b"data:":
        text = _data_of_url(text)
    if b"\n" in text or b"\r" in text:
        text = _join_lines(text)
    if b" " in text:  # "+" becomes a space when URL-encoding is decoded once too often
        raise MalformedRequest('not base64: it contains spaces, perhaps instead of "+"')
    if b"-" in text or b"_" in text:
        if b"+" in text or b"/" in text:
            raise MalformedRequest("not base64: it mixes the standard and the URL-safe alphabet")
        text = text.translate(URL_SAFE)
    digits = text.rstrip(b"=")
    padding = -len(digits) % 4
    if padding == 3 or len(text) - len(digits) not in (0, padding):
        raise MalformedRequest("not base64: the length is wrong; the text may be truncated")
    return binascii.a2b_base64(digits + b"=" * padding, strict_mode=True)


def _data_of_url(url: bytes) -> bytes:
    """The data after the head of a data URL (RFC 2397), such as `data:image/png;name=a.png;base64,`."""
    comma = url.find(b",", 0, MAX_DATA_URL_HEAD)
    if comma < 0:
        raise MalformedRequest("a data URL without a comma before its data")
    if not url[:comma].rstrip().lower().endswith(b";base64"):
        raise MalformedRequest("a data URL whose data is not base64")
    return url[comma + 1 :].lstrip()


def _join_lines(text: bytes) -> bytes:
    """The text without line breaks, and without white space at the ends of lines."""
    if b" " in text or b"\t" in text:
        text = b"".join(line.strip() for line in text.split(b"\n"))
    return text.translate(None, b"\r\n")
