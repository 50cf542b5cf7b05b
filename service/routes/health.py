"""Is it alive, does it take work, how does it fare."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.routes.context import ClientOf, MetricsOf
from service.schemas import StatusBody
from service.types import State

router = APIRouter(tags=["health"])


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


@router.get("/metrics", response_class=Response)
async def metrics(metrics: MetricsOf) -> Response:
    """Prometheus text."""
    return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
