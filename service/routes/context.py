"""What handlers may ask for; `create_app` puts it into the application's state.

They are coroutines because FastAPI would send plain functions through its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.errors import Unauthorized
from service.journey import Journey
from service.keys import Keys
from service.metrics import Metrics
from service.schemas import ModelBody
from service.types import EngineClient


async def _client(request: Request) -> EngineClient:
    client: EngineClient = request.app.state.client
    return client


async def _journey(request: Request) -> Journey:
    journey: Journey = request.app.state.journey
    return journey


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


async def _model(request: Request) -> ModelBody:
    model: ModelBody = request.app.state.model
    return model


async def _keys(request: Request) -> Keys:
    keys: Keys = request.app.state.keys
    return keys


async def require_key(
    keys: Annotated[Keys, Depends(_keys)],
    shown: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    """Raises `Unauthorized` before anything else is done for a request, its body not yet read."""
    if shown is None or not keys.accept(shown.credentials):
        raise Unauthorized


ClientOf = Annotated[EngineClient, Depends(_client)]
JourneyOf = Annotated[Journey, Depends(_journey)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
ModelOf = Annotated[ModelBody, Depends(_model)]
