"""What bytes are, by how they begin. Content types are often absent or wrong."""

import re
from typing import Literal

from rednet.service.parsing.base64_text import decode_base64

HEAD = 512  # bytes that are looked at
Content = Literal["image", "JSON", "form", "URL-encoded form", "base64", "data URL", "unknown"]

SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG",
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cJXL ",  # JPEG XL in its container
    b"\xff\x0a",  # JPEG XL without
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\0\0\1\0",  # ICO
    b"8BPS",  # Photoshop
)
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}")
URL_ENCODED = re.compile(rb"[\w.%+\[\]-]{1,100}=[!-~]")


def begins_like_image(data: bytes | memoryview) -> bool:
    """Whether data begins like a file of an image format, served or not."""
    head = bytes(data[:16])
    if head.startswith(SIGNATURES):
        return True
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)  # reserved, zero
    return is_webp or is_bmp or head[4:8] == b"ftyp"  # AVIF, HEIC


def is_encoded_image(text: bytes | memoryview) -> bool:
    """Whether text begins like an image in base64 or a data URL of one."""
    head = bytes(text[:HEAD]).strip()
    if head[:5].lower() == b"data:":
        head = head.partition(b",")[2].strip()
    digits = BASE64.match(b"".join(head[:80].split()))
    if not digits:
        return False
    start = decode_base64(digits[0][: len(digits[0]) // 4 * 4])
    return isinstance(start, bytes) and begins_like_image(start)


def content_of(data: bytes | memoryview) -> Content:
    """What data begins like."""
    if begins_like_image(data):
        return "image"
    head = bytes(data[:HEAD]).lstrip()
    if head.startswith(BOMS) or b"\0" in head[:2]:  # UTF-16, perhaps: half of its bytes are zero
        head = head.translate(None, b"\0\xef\xbb\xbf\xff\xfe").lstrip()
    if head.startswith((b"{", b"[", b'"')):
        return "JSON"
    if head.startswith(b"--") and b"content-disposition" in head.lower():
        return "form"
    if head[:5].lower() == b"data:":
        return "data URL"
    if is_encoded_image(head):
        return "base64"
    return "URL-encoded form" if URL_ENCODED.match(head) else "unknown"
