"""What handlers may ask for; `create_app` puts it into the application's state.

They are coroutines because FastAPI would send plain functions through its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Request

from service.journey import Journey
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


ClientOf = Annotated[EngineClient, Depends(_client)]
JourneyOf = Annotated[Journey, Depends(_journey)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
ModelOf = Annotated[ModelBody, Depends(_model)]
