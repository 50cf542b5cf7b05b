"""Static files: read once, and revalidated by their ETag."""

import hashlib
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import NamedTuple

from fastapi import Response

HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser revalidates cached files by their ETag, so that it sees updates at once
}
# Only files and requests of this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src {images}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MEDIA_TYPES = {  # the system's table of types may differ or be missing
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}


class File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def read_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, File]]:
    """All files of a folder that have one of the media types, by path."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from read_files(entry, f"{prefix}{entry.name}/")
        elif media_type := MEDIA_TYPES.get(PurePosixPath(entry.name).suffix):
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            yield prefix + entry.name, File(content, media_type, etag)


def file_response(file: File, if_none_match: str, images: str) -> Response:
    """The file, or 304 if the browser has it.

    Args:
        file: to send.
        if_none_match: the request's header.
        images: sources of images that the Content-Security-Policy allows.
    """
    headers = HEADERS | {"ETag": file.etag, "Content-Security-Policy": POLICY.format(images=images)}
    if file.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
