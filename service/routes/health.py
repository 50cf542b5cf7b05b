"""Is it alive, does it take work, how does it fare."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.routes.context import ClientOf, MetricsOf
from service.schemas import LiveBody, ReadyBody, StatusBody
from service.types import State

router = APIRouter(tags=["health"])  # never behind a key
scraped = APIRouter(tags=["health"])


@router.get("/livez", responses={503: {"model": StatusBody}})
async def livez(client: ClientOf, response: Response) -> StatusBody:
    """200 while the process is worth keeping, 503 once its engine has failed."""
    response.status_code = 503 if client.state is State.FAILED else 200
    return StatusBody(status=client.state)


@router.get("/readyz", responses={503: {"model": StatusBody}})
async def readyz(client: ClientOf, response: Response) -> StatusBody:
    """200 while requests are taken: not before warm-up has ended, and not after the first moment of a drain."""
    response.status_code = 200 if client.state is State.READY else 503
    return StatusBody(status=client.state)


@router.get("/v2/health/live", responses={503: {"model": LiveBody}})
async def live(client: ClientOf, response: Response) -> LiveBody:
    """`/livez` for the Open Inference Protocol."""
    alive = client.state is not State.FAILED
    response.status_code = 200 if alive else 503
    return LiveBody(live=alive)


@router.get("/v2/health/ready", responses={503: {"model": ReadyBody}})
async def ready(client: ClientOf, response: Response) -> ReadyBody:
    """`/readyz` for the Open Inference Protocol."""
    takes_work = client.state is State.READY
    response.status_code = 200 if takes_work else 503
    return ReadyBody(ready=takes_work, live=takes_work)


@scraped.get("/metrics", response_class=Response)
async def metrics(metrics: MetricsOf) -> Response:
    """Prometheus text."""
    return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
