"""Rejects unknown and repeated query parameters."""

from collections.abc import Callable, Collection, Coroutine, Iterator
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from rednet.service.errors import MalformedRequest
from rednet.service.http.routes.context import check_key

MAX_SHOWN_CHARS = 64  # of an unknown name, in the message


class StrictRoute(APIRoute):
    """A route that accepts only the query parameters that it declares, each at most once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = frozenset(_names(self.dependant))

        async def check_and_handle(request: Request) -> Response:
            if query := request.scope["query_string"]:
                try:
                    check_parameters(query, known)
                except MalformedRequest:
                    await check_key(request)  # a missing API key takes precedence
                    raise
            return await handle(request)

        return check_and_handle


def check_parameters(query: bytes, known: Collection[str]) -> None:
    """Check the names of query parameters.

    Args:
        query: of a URL.
        known: the allowed names.

    Raises:
        MalformedRequest: a name is unknown or repeated.
    """
    seen = set()
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in known:
            raise MalformedRequest(f"query.{name[:MAX_SHOWN_CHARS]}: unknown parameter; {_hint(name, known)}")
        if name in seen:
            raise MalformedRequest(f"query.{name}: given more than once")
        seen.add(name)


def _hint(name: str, known: Collection[str]) -> str:
    if not known:
        return "this endpoint has none"
    if similar := get_close_matches(name[:MAX_SHOWN_CHARS].lower(), known, n=1):
        return f"did you mean {similar[0]}?"
    return f"this endpoint has {', '.join(sorted(known))}"


def _names(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for each in dependant.dependencies:
        yield from _names(each)
