"""Is it alive, does it take work, how does it fare."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from rednet.service.http.routes.context import context
from rednet.service.http.schemas import LiveBody, ReadyBody, StatusBody
from rednet.service.types import State

router = APIRouter(tags=["health"])  # never behind a key
scraped = APIRouter(tags=["health"])


@router.get("/livez", responses={503: {"model": StatusBody}})
async def livez(request: Request, response: Response) -> StatusBody:
    """200 while the process is worth keeping, 503 once its engine has failed."""
    state = context(request).pipeline.state
    response.status_code = 503 if state is State.FAILED else 200
    return StatusBody(status=state)


@router.get("/readyz", responses={503: {"model": StatusBody}})
async def readyz(request: Request, response: Response) -> StatusBody:
    """200 while requests are taken: not before warm-up has ended, and not after the first moment of a drain, and not
    while no decoder process is alive."""
    state = context(request).pipeline.state
    response.status_code = 200 if state is State.READY else 503
    return StatusBody(status=state)


@router.get("/v2/health/live", responses={503: {"model": LiveBody}})
async def live(request: Request, response: Response) -> LiveBody:
    """`/livez` for the Open Inference Protocol."""
    alive = context(request).pipeline.state is not State.FAILED
    response.status_code = 200 if alive else 503
    return LiveBody(live=alive)


@router.get("/v2/health/ready", responses={503: {"model": ReadyBody}})
async def ready(request: Request, response: Response) -> ReadyBody:
    """`/readyz` for the Open Inference Protocol."""
    takes_work = context(request).pipeline.state is State.READY
    response.status_code = 200 if takes_work else 503
    return ReadyBody(ready=takes_work, live=takes_work)


@scraped.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(context(request).pipeline.metrics.text(), media_type=CONTENT_TYPE_LATEST)
