"""Builds everything and wires it together."""

import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rednet import Checkpoint, Prepared, load_checkpoint, prepare
from rednet.model.inference.preparation import resolve_device
from rednet.service.decoding.decoder import Decoder
from rednet.service.decoding.limits import DecodeLimits, memory_for_decoders
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.client import LocalClient
from rednet.service.engine.engine import Engine
from rednet.service.engine.runner import PreparedRunner, driver_name, set_threads
from rednet.service.http.api_keys import Keys
from rednet.service.http.app import create_app
from rednet.service.http.connections import Connection
from rednet.service.model_description import describe
from rednet.service.observability import log
from rednet.service.observability.gpus import watch_gpus
from rednet.service.observability.metrics import DeviceEvents, Metrics
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores
from rednet.service.system.sockets import url
from rednet.service.types import EngineClient, State

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none

CONNECTIONS = 65_536  # that may be open at once, where the system allows it

# How long a drain refuses at least, even with nothing to do: a caller who is about to send another request over an open
# connection gets an answer that closes it, instead of a connection that breaks under the request.
SHORTEST_DRAIN_S = 1.0

# Longer than proxies keep idle connections: the one that closes first must not be the one that cannot know whether a
# request is on its way already. nginx keeps them for 60 s.
KEEP_ALIVE_S = 75

# That is ever chosen, by kind of device; warm-up stops long before where larger batches gain nothing.
LARGEST_BATCH = {"cpu": 64, "cuda": 256}


class Server(uvicorn.Server):
    """Uvicorn with a drain: after SIGTERM, SIGINT or SIGHUP the port stays open, and new requests are refused, until
    all accepted ones are answered. A second SIGTERM or SIGINT stops at once.
    """

    def __init__(self, config: uvicorn.Config, client: EngineClient, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._client = client
        self._drain_timeout_s = drain_timeout_s
        self._drain_since: float | None = None
        self._shortest_drain_s = SHORTEST_DRAIN_S
        self._failed = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        gc.collect()
        gc.freeze()  # a million objects that stay: looking through them again and again would hold requests up
        # Unless it is ignored, as by `nohup`. Uvicorn itself handles SIGTERM and SIGINT.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(SIGHUP) == signal.SIG_DFL:
            signal.signal(SIGHUP, self.handle_exit)
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            logger.info("running on %s (press Ctrl-C to quit)", url(each))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:  # nothing has been accepted, and what startup waits for may take long
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        elif self._drain_since is None:
            if self._client.state is State.STARTING:  # nothing has been accepted
                self._shortest_drain_s = 0.0
            self._drain_since = time.monotonic()
            self._client.begin_drain()
        elif sig != SIGHUP:  # when a terminal is closed, the kernel sends it, and so does the shell
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._client.state is State.FAILED:
            self._failed = True  # whatever becomes of it: a device that hung may come back while the server stops
            await self._client.close()  # an engine that hangs would keep its callers waiting, and them the server
            self.config.timeout_graceful_shutdown = 1
            return True
        if self._drain_since is not None:
            drained_s = time.monotonic() - self._drain_since
            left_s = self._drain_timeout_s - drained_s
            if left_s <= 0 or (drained_s >= self._shortest_drain_s and not self._client.requests):
                await self._client.close()  # whoever still waits is told now
                self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))  # for answers still being sent
                return True
        return await super().on_tick(counter)

    @property
    def exit_code(self) -> int:
        return 1 if self.force_exit or self._failed else 0


def serve(settings: Settings, sockets: Sequence[socket.socket], keys: Keys | None) -> int:
    """Serve until a signal ends it; returns the process's exit status.

    Args:
        settings: the options.
        sockets: bound; the server listens on them.
        keys: of which requests must carry one; None: no key is needed.

    Raises:
        CheckpointError, ValueError: the checkpoint, the device or --max-pixels cannot be used.
    """
    writer = log.configure(settings.log_level, settings.log_format)
    _allow_connections()
    limits = _decode_limits(settings)
    set_threads(_threads(settings))
    checkpoint = load_checkpoint(settings.checkpoint)
    prepared = prepare_each(checkpoint, settings)
    for reason in prepared[0].rejected_backends:
        logger.warning("rejected backend: %s", reason)
    model = describe(checkpoint, prepared)
    metrics = Metrics()
    metrics.model(model)
    metrics.watch_log(lambda: writer.dropped)
    if gpus := [each.device for each in prepared if each.device.type == "cuda"]:
        watch_gpus(metrics.registry, {str(device): driver_name(device) for device in gpus})
    client = LocalClient([_engine(each, settings, metrics) for each in prepared], settings.max_queue)
    decoder = Decoder(checkpoint.preprocess, limits, usable_cores())
    del checkpoint  # the plain network's weights are not needed any more
    app = create_app(settings, client, decoder, metrics, model, keys)
    logger.info("serving %s on %s in %s: %s", model.name, model.device, model.precision, model.backend)
    server = Server(uvicorn_config(app, settings), client, settings.drain_timeout_s)
    server.run(list(sockets))
    return server.exit_code


def _decode_limits(settings: Settings) -> DecodeLimits:
    """What decoding may cost here.

    Raises:
        ValueError: the memory does not suffice for an image of --max-pixels, which was asked for.
    """
    limits = DecodeLimits.derive(settings.max_pixels, memory_for_decoders(), usable_cores())
    if limits.largest_pixels < limits.max_pixels:
        found = f"there is memory to decode {limits.largest_pixels} pixels in every format, not {limits.max_pixels}"
        if "max_pixels" in settings.model_fields_set:
            raise ValueError(f"--max-pixels {limits.max_pixels} is too large: {found}")
        logger.warning("%s: larger images are refused where their format needs more memory", found)
    return limits


def prepare_each(checkpoint: Checkpoint, settings: Settings) -> list[Prepared]:
    """The network on every device that was asked for, in one precision: the one that is best on the first.

    Raises:
        ValueError: a device is named twice, is not here, or has not that precision.
    """
    devices = [resolve_device(name.strip()) for name in settings.device.split(",")]
    if len({(device.type, device.index or 0) for device in devices}) < len(devices):
        raise ValueError(f"--device {settings.device} names one device twice")
    prepared: list[Prepared] = []
    for device in devices:
        precision = prepared[0].precision if prepared else settings.precision
        prepared.append(prepare(checkpoint.net, checkpoint.preprocess, device, precision, checkpoint.calibration))
    return prepared


def _threads(settings: Settings) -> int:
    """As many as asked for, but no more than the machine has cores: they would only wait for each other."""
    cores = os.cpu_count() or 1
    if settings.threads == "auto":
        return usable_cores()
    if settings.threads > cores:
        logger.warning("--threads %d: using %d, as many as there are cores", settings.threads, cores)
    return min(settings.threads, cores)


def _allow_connections() -> None:
    """Where the system lets this process have only a thousand files open unless it asks for more: idle ones count."""
    if sys.platform != "win32":
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS if most == resource.RLIM_INFINITY else min(most, CONNECTIONS)
        with suppress(ValueError):  # the system may have a limit of its own, which is lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def _engine(prepared: Prepared, settings: Settings, metrics: Metrics) -> Engine:
    wanted = settings.max_batch_size
    largest = min(settings.max_queue, LARGEST_BATCH[prepared.device.type] if wanted == "auto" else wanted)
    runner = PreparedRunner(prepared, largest, auto=wanted == "auto")
    batcher = Batcher(largest, settings.max_wait_ms / 1000)
    return Engine(lambda: runner, batcher, DeviceEvents(metrics, str(prepared.device)))


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        log_config=None,
        access_log=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],  # of every answer
        proxy_headers=False,  # nobody here asks for a caller's address
    )
