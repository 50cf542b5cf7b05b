"""Interactive API documentation: Swagger UI, from a package, so that it works without internet.

Links are relative, so that it works behind a proxy that adds a path prefix.
"""

from importlib import resources
from importlib.util import find_spec
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from rednet.service.errors import NotFound
from rednet.service.http.routes.static import File, file_response, read_files

TITLE = "RedNet Serve"
# Swagger UI's icons are data URLs.
POLICY_IMAGES = "'self' blob: data:"

# Only the files of fastapi-swagger are used: they are those of npm's swagger-ui-dist.
VIEWER = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")


def _files() -> dict[str, File]:
    if find_spec("fastapi_swagger") is None:
        return {}
    ours = resources.files("rednet.service.http") / "docs_viewer"
    package = resources.files("fastapi_swagger") / "resources"
    return dict(read_files(ours)) | {path: file for path, file in read_files(package) if path in VIEWER}


router = APIRouter(include_in_schema=False)
FILES = _files()


@router.get("/docs")
async def viewer(if_none_match: Annotated[str, Header()] = "") -> Response:
    if not FILES:
        raise NotFound("the viewer is not installed: pip install fastapi-swagger; the document is at openapi.json")
    return file_response(FILES["index.html"], if_none_match, POLICY_IMAGES)


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs/{path}")
async def file(path: str, if_none_match: Annotated[str, Header()] = "") -> Response:
    """A file of the viewer."""
    if path not in FILES:
        raise NotFound(f"the documentation has no file {path!r}")
    return file_response(FILES[path], if_none_match, POLICY_IMAGES)


@router.get("/redoc")
async def former_viewer() -> Response:
    return RedirectResponse("docs")


@router.get("/docs/")
@router.get("/redoc/")
async def without_slash(request: Request) -> Response:
    """Redirect to the path without a final slash, for which the relative links are written."""
    return RedirectResponse(f"..{request.url.path.rstrip('/')}")
