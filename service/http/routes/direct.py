"""A shorter way to a handler."""

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from rednet.service.errors import ServiceError
from rednet.service.http.error_responses import service_error
from rednet.service.http.routes.context import check_key


class DirectRoutesMiddleware:
    """ASGI middleware: a request without a query goes directly to its handler, after the API key is checked.

    FastAPI would find that there is nothing else to resolve. Requests with a query, whose parameters it validates, are
    left to it.

    Args:
        app: answers all other requests.
        router: of handlers whose only parameters are the request and options from its query, which have defaults.
            Its dependencies are skipped: do not add any.
    """

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        self._app = app
        routes = [route for route in router.routes if isinstance(route, APIRoute)]
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http" and not scope["query_string"]:
            route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            await check_key(request)
            response = await route.endpoint(request)
            await response(scope, receive, send)
        except ServiceError as error:
            # Without its traceback: the error may be shared, and the frames hold the body.
            response = await service_error(request, error.with_traceback(None))
            await response(scope, receive, send)
