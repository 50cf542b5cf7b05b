"""Detects the kind of a body from its first bytes, as content types are often missing or wrong."""

import re
from typing import Literal

from rednet.service.parsing.base64_text import decode_base64

HEAD_BYTES = 512  # that are inspected
# With articles, as in messages.
Content = Literal["an image", "JSON", "a form", "a URL-encoded form", "base64", "a data URL", "unknown"]

SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG",
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cJXL ",  # JPEG XL container
    b"\xff\x0a",  # JPEG XL codestream
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\0\0\1\0",  # ICO
    b"8BPS",  # Photoshop
)
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}")
URL_ENCODED = re.compile(rb"[\w.%+\[\]-]{1,100}=[!-~]")


def begins_like_image(data: bytes | memoryview) -> bool:
    """Whether data begins like an image file, of a supported format or another one."""
    head = bytes(data[:16])
    if head.startswith(SIGNATURES):
        return True
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)  # a reserved field
    return is_webp or is_bmp or head[4:8] == b"ftyp"  # AVIF, HEIC


def is_encoded_image(text: bytes | memoryview) -> bool:
    """Whether text begins like an image in base64 or in a data URL."""
    head = bytes(text[:HEAD_BYTES]).strip()
    if head[:5].lower() == b"data:":
        head = head.partition(b",")[2].strip()
    digits = BASE64.match(b"".join(head[:80].split()))
    if not digits:
        return False
    start = decode_base64(digits[0][: len(digits[0]) // 4 * 4])
    return isinstance(start, bytes) and begins_like_image(start)


def content_of(data: bytes | memoryview) -> Content:
    """The kind of content that data begins like."""
    if begins_like_image(data):
        return "an image"
    head = bytes(data[:HEAD_BYTES]).lstrip()
    if head.startswith(BOMS) or b"\0" in head[:2]:  # perhaps UTF-16, in which every other byte is zero
        head = head.translate(None, b"\0\xef\xbb\xbf\xff\xfe").lstrip()
    if head.startswith((b"{", b"[", b'"')):
        return "JSON"
    if head.startswith(b"--") and b"content-disposition" in head.lower():
        return "a form"
    if head[:5].lower() == b"data:":
        return "a data URL"
    if is_encoded_image(head):
        return "base64"
    return "a URL-encoded form" if URL_ENCODED.match(head) else "unknown"
