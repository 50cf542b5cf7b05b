"""Liveness, readiness and metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics import exposition as openmetrics

from rednet.service.http.routes.accept import prefers
from rednet.service.http.routes.context import context
from rednet.service.http.schemas import LiveBody, ReadyBody, StatusBody
from rednet.service.types import State

router = APIRouter(tags=["health"])  # never requires an API key
metrics_router = APIRouter(tags=["health"])


@router.get("/livez", responses={503: {"model": StatusBody}})
async def livez(request: Request, response: Response) -> StatusBody:
    """200 as long as the engine works, 503 once it has failed and the process should be restarted."""
    state = context(request).pipeline.state
    response.status_code = 503 if state is State.FAILED else 200
    return StatusBody(status=state)


@router.get("/readyz", responses={503: {"model": StatusBody}})
async def readyz(request: Request, response: Response) -> StatusBody:
    """200 while requests are accepted; 503 during warm-up, from the start of a drain, and while no decoder process is
    running."""
    state = context(request).pipeline.state
    response.status_code = 200 if state is State.READY else 503
    return StatusBody(status=state)


@router.get("/v2/health/live", name="server_live", responses={503: {"model": LiveBody}})
async def live(request: Request, response: Response) -> LiveBody:
    """`/livez` for the Open Inference Protocol."""
    alive = context(request).pipeline.state is not State.FAILED
    response.status_code = 200 if alive else 503
    return LiveBody(live=alive)


@router.get("/v2/health/ready", name="server_ready", responses={503: {"model": ReadyBody}})
async def ready(request: Request, response: Response) -> ReadyBody:
    """`/readyz` for the Open Inference Protocol."""
    is_ready = context(request).pipeline.state is State.READY
    response.status_code = 200 if is_ready else 503
    return ReadyBody(ready=is_ready, live=is_ready)


@metrics_router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format, or in the OpenMetrics format, which has exemplars."""
    found = context(request).pipeline.metrics
    if prefers(request.headers.get("accept", ""), "application/openmetrics-text", "text/plain"):
        return Response(found.openmetrics(), media_type=openmetrics.CONTENT_TYPE_LATEST)
    return Response(found.text(), media_type=CONTENT_TYPE_LATEST)
