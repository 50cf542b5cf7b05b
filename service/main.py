"""`rednet serve`: loads the application and runs it behind HTTP, and gRPC if that is asked for."""

import logging
import socket
from collections.abc import Callable, Sequence

from fastapi import FastAPI

from rednet.service.api_keys import KeyFile
from rednet.service.build import build, decode_limits, decoder_count
from rednet.service.decoding.limits import DecodeLimits
from rednet.service.engine.admission import OwnCounts
from rednet.service.http.app import create_app
from rednet.service.http.server import OtherServer, Server, uvicorn_config
from rednet.service.memory_check import MemoryCheck
from rednet.service.network import Network, load_network, release_memory
from rednet.service.observability import log, tracing
from rednet.service.observability.gpus import watch_gpus
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.reloading import ReloadablePipeline, reload_keys
from rednet.service.settings import Settings
from rednet.service.system.file_limit import raise_file_limit
from rednet.service.system.hangup import Hangups
from rednet.service.system.memory import resident_bytes
from rednet.service.system.sockets import grpc_addresses
from rednet.service.types import QueueCounts

logger = logging.getLogger(__name__)


def serve(
    settings: Settings,
    sockets: Sequence[socket.socket],
    keys: KeyFile | None,
    hangups: Hangups,
    grpc_sockets: Sequence[socket.socket] = (),
    load_model: Callable[[Settings], Network] = load_network,
) -> int:
    """Serve until a signal ends it, and return the process's exit status.

    Args:
        settings: the options.
        sockets: bound; the server listens on them.
        keys: one of which a request must carry; None: requests need no key.
        hangups: receive SIGHUP.
        grpc_sockets: bound; where to listen for gRPC, if anywhere.
        load_model: loads the network, at the start and on every reload.

    Raises:
        CheckpointError, ValueError: the checkpoint, the device or --max-pixels cannot be used.
    """
    app, pipeline = load_app(settings, keys, OwnCounts(), load_model)
    hangups.log_if_ignored()

    async def reload() -> None:
        logger.info("SIGHUP: loading the API keys and the checkpoint again")
        if keys is not None:
            await reload_keys(keys, pipeline.metrics)
        await pipeline.reload()

    other: OtherServer | None = None
    if grpc_sockets:
        from rednet.service.grpc.server import GrpcServer  # noqa: PLC0415  (an extra)

        other = GrpcServer(
            settings, pipeline, app.state.current_context().budget, keys, grpc_addresses(grpc_sockets), grpc_sockets
        )
    server = Server(uvicorn_config(app, settings), pipeline, settings.drain_timeout_s, hangups, reload, other)
    server.run(list(sockets))
    return server.exit_code


def load_app(
    settings: Settings,
    keys: KeyFile | None,
    counts: QueueCounts,
    load_model: Callable[[Settings], Network] = load_network,
) -> tuple[FastAPI, ReloadablePipeline]:
    """Load the network, and build the application around it and around those that may replace it.

    Args:
        settings: the options.
        keys: one of which a request must carry; None: requests need no key.
        counts: of the server.
        load_model: loads the network, now and on every reload.

    Raises:
        CheckpointError, ValueError: the checkpoint, the device or --max-pixels cannot be used.
    """
    writer = log.configure(settings.log_level, settings.log_format)
    tracing.configure()
    raise_file_limit()
    metrics = Metrics()
    metrics.watch_log(lambda: writer.dropped)
    base_bytes = resident_bytes()
    network = load_model(settings)
    if network.gpus:
        watch_gpus(metrics.registry, network.gpus)
    limits = decode_limits(settings)  # also of networks to come: now there is one of them in memory, as there will be
    memory = MemoryCheck(settings.checkpoint, base_bytes, decoder_count(settings), list(network.gpus))
    devices = network.description.device

    def load() -> Pipeline:
        memory.check()
        network = load_model(settings)
        if network.description.device != devices:  # --device auto prefers a slow server to none at all
            raise ValueError(f"it would run on {network.description.device}, not on {devices}")
        return _build(settings, network, metrics, counts, limits)

    first = _build(settings, network, metrics, counts, limits)
    pipeline = ReloadablePipeline(first, load, metrics, counts, release_memory)
    return create_app(settings, pipeline, keys), pipeline


def _build(
    settings: Settings, network: Network, metrics: Metrics, counts: QueueCounts, limits: DecodeLimits
) -> Pipeline:
    network.log()
    return build(settings, network, metrics, counts, limits)
