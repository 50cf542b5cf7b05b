"""What handlers work with; `create_app` puts it into the application's state.

One value, looked up by hand: FastAPI would resolve parameters one by one for every request, which costs as much as all
the rest of its way to a handler.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rednet.service.decoding.decoder import Decoder
from rednet.service.errors import Unauthorized
from rednet.service.http.api_keys import Keys
from rednet.service.model_description import ModelBody
from rednet.service.observability.metrics import Metrics
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.pipeline import Journey
from rednet.service.types import EngineClient, State


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of a server that answer requests."""

    journey: Journey
    client: EngineClient
    decoder: Decoder
    metrics: Metrics
    budget: MemoryBudget
    model: ModelBody
    keys: Keys | None  # None: anyone may ask

    @property
    def state(self) -> State:
        """The engine's, but not ready while no photo can be decoded."""
        state = self.client.state
        return State.NO_DECODER if state is State.READY and not self.decoder.available else state


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
    await require_key(request, await BEARER(request))
