"""Serves the demo page, which classifies photos and shows heat maps. It uses the public API."""

from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Header, Response

from rednet.service.errors import NotFound
from rednet.service.http.routes.static import file_response, read_files

IMAGES = "'self' blob:"  # `blob:`: photos that the browser holds
FILES = dict(read_files(resources.files("rednet.service.http") / "page"))

router = APIRouter(include_in_schema=False)


@router.get("/page/{path:path}")
async def file(path: str, if_none_match: Annotated[str, Header()] = "") -> Response:
    """A file of the page."""
    if path not in FILES:
        raise NotFound(f"the page has no file {path!r}")
    return file_response(FILES[path], if_none_match, IMAGES)


@router.get("/")
async def page(if_none_match: Annotated[str, Header()] = "") -> Response:
    """The HTML of the page."""
    return await file("index.html", if_none_match)
