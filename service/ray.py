"""The application of `rednet serve` as a deployment of Ray Serve: `serve run rednet.service.ray:app`.

Each replica has a network and decoders of its own. Its own admission refuses what would be late, so Serve never queues.
"""

import asyncio
import gc
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rednet.service.autoscaling import OFFERED_LOAD, OfferedLoad
from rednet.service.settings import Settings, SettingsError, check_files, read_settings
from rednet.service.types import State

POLL_S = 0.05
# Options that Serve has instead: where to listen, and how replicas end.
NOT_HERE = ("host", "port", "uds", "grpc_port", "frontends", "drain_timeout_s")


@serve.deployment(
    max_ongoing_requests=1_000_000,  # never reached
    health_check_period_s=2,
    graceful_shutdown_timeout_s=35,  # more than --request-timeout-s
    graceful_shutdown_wait_loop_s=0.2,
    max_surge_percent=25,  # but at least one: a new replica is ready before an old one stops
)
@serve.ingress()
class RedNet:
    """One replica.

    Args:
        options: of the server, which take precedence over REDNET_* variables of the replica.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # Serve's controller and its proxies import this module, too: not PyTorch.
        from rednet.service.api_keys import KeyFile  # noqa: PLC0415
        from rednet.service.engine.admission import OwnCounts  # noqa: PLC0415
        from rednet.service.main import load_app  # noqa: PLC0415

        cores = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        settings = read_settings({"threads": cores, "decoders": cores} | dict(self._options), os.environ)
        check_files(settings)
        keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
        counts = OwnCounts()
        app, self._pipeline = load_app(settings, keys, counts)
        self._offered = OfferedLoad(counts.total_offered_s)
        gc.collect()
        gc.freeze()  # a million objects that stay: traversing them again and again would delay requests
        return DisconnectOnCancel(app)

    async def check_health(self) -> None:
        """Wait for the end of the warm-up. Serve sends no request before that, and replaces replicas that fail."""
        while self._pipeline.state is State.STARTING:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(POLL_S)
        if self._pipeline.state is not State.READY:
            raise RuntimeError(f"the replica cannot answer: {self._pipeline.state}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the policy needs, averaged by Serve over the look-back period."""
        return {OFFERED_LOAD: self._offered.rate()}


class DisconnectOnCancel:
    """ASGI middleware: when Serve cancels a request because its client has left, the application receives
    `http.disconnect`, as it does from other servers, and counts the request as 499."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = asyncio.get_running_loop().create_future()

        async def receive_until_left() -> Message:
            receiving = asyncio.ensure_future(receive())
            try:
                await asyncio.wait((receiving, left), return_when=asyncio.FIRST_COMPLETED)
                if left.done() or isinstance(receiving.exception(), TaskCancelledError):  # raised during an upload
                    return {"type": "http.disconnect"}
                return receiving.result()
            finally:
                receiving.cancel()

        answering = asyncio.ensure_future(self._app(scope, receive_until_left, send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            left.set_result(None)
            await asyncio.wait((answering,))
            raise


def app(options: dict[str, Any]) -> serve.Application:
    """The application. Arguments of `serve run`, or `args` in a YAML file, are options of `rednet serve`:
    `precision=int8`, `max_queue=64`.

    Raises:
        SettingsError: there is no such option here, or its value is invalid.
    """
    usable = [name for name in Settings.model_fields if name not in NOT_HERE]
    if unusable := sorted(options.keys() - set(usable)):
        raise SettingsError(f"{unusable[0]} is not an option here; the options are {', '.join(usable)}")
    read_settings(options, {})
    return RedNet.bind(options)  # type: ignore[attr-defined]  # mypy does not know what decorators make of a class
