"""Serves the demo page, which classifies photos and shows heat maps. It uses the public API."""

import hashlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header, Response

from rednet.service.errors import NotFound

HEADERS = {
    # Only files and requests of this server, and photos that the browser holds.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser revalidates cached files by their ETag, so that it sees updates at once
}
MEDIA_TYPES = {  # the system's table of types may differ or be missing
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}


class File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, File]]:
    """All files of the page, by path."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        else:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            yield prefix + entry.name, File(content, MEDIA_TYPES[PurePosixPath(entry.name).suffix], etag)


FILES = dict(_files(resources.files("rednet.service.http") / "page"))

router = APIRouter(include_in_schema=False)


@router.get("/page/{path:path}")
async def file(path: str, if_none_match: Annotated[str, Header()] = "") -> Response:
    """A file of the page."""
    if path not in FILES:
        raise NotFound(f"the page has no file {path!r}")
    content, media_type, etag = FILES[path]
    headers = HEADERS | {"ETag": etag}
    if etag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@router.get("/")
async def page(if_none_match: Annotated[str, Header()] = "") -> Response:
    """The HTML of the page."""
    return await file("index.html", if_none_match)
