"""`rednet serve`: builds the pipeline and runs it behind HTTP, and gRPC if that is asked for."""

import logging
import resource
import socket
from collections.abc import Sequence
from contextlib import suppress

from rednet.service.api_keys import Keys
from rednet.service.build import build
from rednet.service.http.app import create_app
from rednet.service.http.server import OtherServer, Server, uvicorn_config
from rednet.service.network import load_network
from rednet.service.observability import log
from rednet.service.settings import Settings

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 65_536  # connections, above all


def serve(
    settings: Settings,
    sockets: Sequence[socket.socket],
    keys: Keys | None,
    grpc_sockets: Sequence[socket.socket] = (),
) -> int:
    """Serve until a signal ends it, and return the process's exit status.

    Args:
        settings: the options.
        sockets: bound; the server listens on them.
        keys: one of which a request must carry; None: requests need no key.
        grpc_sockets: bound; where to listen for gRPC, if anywhere.

    Raises:
        CheckpointError, ValueError: the checkpoint, the device or --max-pixels cannot be used.
    """
    writer = log.configure(settings.log_level, settings.log_format)
    _raise_file_limit()
    network = load_network(settings)
    model = network.description
    for reason in model.passed_over:
        logger.warning("rejected backend: %s", reason)
    pipeline = build(settings, network)
    pipeline.metrics.watch_log(lambda: writer.dropped)
    app = create_app(settings, pipeline, keys)
    logger.info("serving %s on %s in %s: %s", model.name, model.device, model.precision, model.backend)
    other: OtherServer | None = None
    if grpc_sockets:
        from rednet.service.grpc.server import GrpcServer  # noqa: PLC0415  (an extra)

        other = GrpcServer(settings, pipeline, app.state.context.budget, keys, grpc_sockets)
    server = Server(uvicorn_config(app, settings), pipeline.client, settings.drain_timeout_s, other)
    server.run(list(sockets))
    return server.exit_code


def _raise_file_limit() -> None:
    """Many systems allow a process a thousand open files unless it asks for more, and idle connections count."""
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    with suppress(ValueError):  # the system may have a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), hard))
