"""The web application: routes around the pipeline."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache, partial

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from rednet.service import open_inference
from rednet.service.api_keys import KeyFile
from rednet.service.http import openapi
from rednet.service.http.error_responses import add_error_handlers
from rednet.service.http.image_requests import ImageRequests
from rednet.service.http.middleware import AllowedHostsMiddleware, RequestContextMiddleware
from rednet.service.http.routes import docs, embeddings, explain, health, page, v1, v2
from rednet.service.http.routes.context import Context, require_key
from rednet.service.http.routes.direct import DirectRoutesMiddleware
from rednet.service.observability import tracing
from rednet.service.observability.metrics import Metrics
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.parsing.oip import HEADER_LENGTH
from rednet.service.parsing.parser import Parser
from rednet.service.pipeline import Pipeline
from rednet.service.reloading import ReloadablePipeline
from rednet.service.settings import Settings

logger = logging.getLogger(__name__)

MAX_LARGE_BODIES = 16  # bodies of the largest size that fit into memory at a time; of everyday photos, thousands

EXPOSED_HEADERS = ["Retry-After", "X-Request-Id", "Server-Timing", "WWW-Authenticate", HEADER_LENGTH]


def create_app(
    settings: Settings, pipeline: ReloadablePipeline, keys: KeyFile | None = None, processes: int = 1
) -> FastAPI:
    """The application around a pipeline, which it starts and closes.

    Args:
        settings: limits on bodies and deadlines.
        pipeline: not started.
        keys: one of which a request must carry; None: requests need no key.
        processes: that share the memory for bodies.
    """

    @lru_cache(maxsize=1)
    def context_of(current: Pipeline) -> Context:
        return Context(current, ImageRequests(settings, current, parser, budget), budget, keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for route in app.routes:  # FastAPI prepares them when it first looks at them, for 20 ms: not during a request
            route.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})
        await pipeline.start()
        yield
        await pipeline.close()
        parser.close()
        if tracing.is_on():
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title=docs.TITLE,
        description="A RedNet involution classifier.",
        version=open_inference.server_version(),
        lifespan=lifespan,
        servers=[{"url": "."}],  # relative to the document: a proxy may add a path prefix
        docs_url=None,  # `routes.docs` has them, with relative links
        openapi_url=None,  # `routes.docs` has this, too: metrics and the log name the paths of its routes
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        redirect_slashes=False,  # a redirect would carry a wrong address behind a proxy; the middleware strips slashes
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `/metrics` and the log have them
    )
    app.openapi = partial(openapi.complete, app)  # type: ignore[method-assign]
    parser = Parser()
    budget = MemoryBudget(max(1, MAX_LARGE_BODIES // processes) * settings.max_body_bytes)
    app.state.current_context = lambda: context_of(pipeline.current)
    if keys is not None:
        logger.info("requests need an API key: %s", keys)
    add_routes(app, settings, guarded=keys is not None)
    add_error_handlers(app)
    add_middleware(app, settings, pipeline.metrics)
    return app


def add_routes(app: FastAPI, settings: Settings, *, guarded: bool) -> None:
    """Add all routes; if `guarded`, those that compute or tell something need an API key."""
    guard = [Depends(require_key)] if guarded else []
    app.include_router(v1.direct, dependencies=guard)
    app.include_router(v1.router, dependencies=guard)
    app.include_router(explain.router, dependencies=guard)
    app.include_router(embeddings.router, dependencies=guard)
    app.include_router(v2.router, dependencies=guard)
    app.include_router(health.router)
    app.include_router(health.metrics_router, dependencies=guard if settings.metrics_access == "key" else [])
    if settings.docs == "on":
        app.include_router(docs.router)
    if settings.page == "on":
        app.include_router(page.router)  # needs no key: it holds nothing, and sends the key that its user types


def add_middleware(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """Add all middleware. What is added last is outermost."""
    app.add_middleware(DirectRoutesMiddleware, router=v1.direct)
    if settings.host_names:
        app.add_middleware(AllowedHostsMiddleware, hosts=settings.host_names)
    app.add_middleware(RequestContextMiddleware, metrics=metrics)
    if settings.origins:  # the outermost: pages may read every answer, and a preflight needs no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # harmless: browsers add no cookies or certificates
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )
