"""What handlers work with; `create_app` puts it into the application's state.

Handlers look up this one value themselves: FastAPI would resolve dependencies one by one for every request, which costs
as much as all the rest of the request's way to a handler.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rednet.service.api_keys import Keys
from rednet.service.errors import Unauthorized
from rednet.service.http.image_requests import ImageRequests
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work with."""

    pipeline: Pipeline
    image_requests: ImageRequests
    budget: MemoryBudget
    keys: Keys | None  # None: requests need no key


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


BEARER = HTTPBearer(auto_error=False)


async def require_key(request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
    """Raises `Unauthorized` before anything else is done for a request, its body not yet read."""
    keys = context(request).keys
    if keys and (shown is None or not keys.accept(shown.credentials)):
        raise Unauthorized


async def check_key(request: Request) -> None:
    """The same outside FastAPI's dependencies."""
    if context(request).keys:
        await require_key(request, await BEARER(request))
