"""Interactive API documentation. Links are relative, so that it works behind a proxy that adds a path prefix."""

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import RedirectResponse

TITLE = "RedNet Serve"
OPENAPI = "openapi.json"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger() -> Response:
    return get_swagger_ui_html(openapi_url=OPENAPI, title=f"{TITLE} - Swagger UI")


@router.get("/redoc")
async def redoc() -> Response:
    return get_redoc_html(openapi_url=OPENAPI, title=f"{TITLE} - ReDoc")


@router.get("/docs/")
@router.get("/redoc/")
async def without_slash(request: Request) -> Response:
    """Redirect to the path without a final slash, for which the relative links are written."""
    return RedirectResponse(f"..{request.url.path.rstrip('/')}")
