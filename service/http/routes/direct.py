"""A shorter way to a handler."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute


class DirectRoute(StrictRoute):
    """For handlers that take the request and options from its query, and make their response themselves.

    Where there is no query the handler is called as it is, with its defaults; FastAPI takes as long to find that out as
    such a handler to refuse a request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        by_fastapi = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.scope["query_string"] or context(request).keys:
                return await by_fastapi(request)
            response: Response = await self.endpoint(request)
            return response

        return handle
