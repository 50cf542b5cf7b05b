"""What handlers work with; `create_app` puts what makes it into the application's state.

Handlers look up this one value themselves: FastAPI would resolve dependencies one by one for every request, which costs
as much as all the rest of the request's way to a handler.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rednet.service.api_keys import KeyFile
from rednet.service.errors import Unauthorized
from rednet.service.http.image_requests import ImageRequests
from rednet.service.observability import log
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.pipeline import Pipeline

IN_SCOPE = "rednet.context"  # its key in the ASGI scope


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work with. A reload makes another one, with another network."""

    pipeline: Pipeline
    image_requests: ImageRequests
    budget: MemoryBudget
    keys: KeyFile | None  # None: requests need no key


def context(request: Request) -> Context:
    """The context of a request: for its whole life the one that was current when this was called first."""
    scope = request.scope
    if IN_SCOPE not in scope:
        scope[IN_SCOPE] = request.app.state.current_context()
    found: Context = scope[IN_SCOPE]
    return found


BEARER = HTTPBearer(auto_error=False)


async def require_key(request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
    """Raises `Unauthorized` before anything else is done for a request, its body not yet read."""
    server = context(request)
    if server.keys is None:
        return
    name = server.keys.name_of(shown.credentials) if shown else None
    if name is None:
        raise Unauthorized(key_given=shown is not None)
    log.note(key=name)
    server.pipeline.metrics.authenticated(name)


async def check_key(request: Request) -> None:
    """The same outside FastAPI's dependencies."""
    if context(request).keys is not None:
        await require_key(request, await BEARER(request))
