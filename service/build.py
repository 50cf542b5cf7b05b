"""Wires everything that answers images: the one place for it. Imports no torch."""

import logging
import math
from typing import TYPE_CHECKING

from rednet.service.decoding.decoder import Decoder
from rednet.service.decoding.limits import DecodeLimits, memory_for_decoders
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.client import LocalClient
from rednet.service.engine.engine import HUNG_S, Engine
from rednet.service.engine.inbox import Inbox
from rednet.service.observability.metrics import DeviceEvents, Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores
from rednet.service.types import QueueCounts

if TYPE_CHECKING:
    from rednet.service.network import Network

logger = logging.getLogger(__name__)


def build(
    settings: Settings,
    network: "Network",
    metrics: Metrics,
    counts: QueueCounts,
    decode_limits: DecodeLimits,
    hung_s: float = HUNG_S,
) -> Pipeline:
    """Build everything that answers images, behind the pipeline, which is not started yet.

    Args:
        settings: the options.
        network: what answers them.
        metrics: records what happens.
        counts: of the server, which all its pipelines add to.
        decode_limits: on images, and on the memory of the decoders.
        hung_s: a batch that takes longer means that its device hangs.
    """
    engines = [build_engine(settings, network, device, metrics, hung_s) for device in network.runners]
    decoder = Decoder(network.preprocess, decode_limits, decoder_count(settings))
    client = LocalClient(engines, settings.max_queue, counts)
    return Pipeline(network.description, client, decoder, metrics, network.familiarity)


def build_engine(
    settings: Settings,
    network: "Network",
    device: str,
    metrics: Metrics,
    hung_s: float = HUNG_S,
    inbox: Inbox | None = None,
) -> Engine:
    """Build the engine of one device of the network, not started yet."""
    batcher = Batcher(1, settings.max_wait_ms / 1000)
    return Engine(network.runners[device], batcher, DeviceEvents(metrics, device), hung_s, inbox)


def decoder_count(settings: Settings, processes: int = 1) -> int:
    """The number of decoders of each of several processes, which share them evenly."""
    total = usable_cores() if settings.decoders == "auto" else settings.decoders
    return math.ceil(total / processes)


def decode_limits(settings: Settings, processes: int = 1) -> DecodeLimits:
    """The limits of decoding on this machine, with the memory that this process has left.

    Args:
        settings: the options.
        processes: that share the memory.

    Raises:
        ValueError: the memory does not suffice for an image of --max-pixels, which was asked for.
    """
    limits = DecodeLimits.derive(
        settings.max_pixels, memory_for_decoders() // processes, decoder_count(settings, processes)
    )
    if limits.largest_pixels < limits.max_pixels:
        found = f"there is memory to decode {limits.largest_pixels} pixels in every format, not {limits.max_pixels}"
        if "max_pixels" in settings.model_fields_set:
            raise ValueError(f"--max-pixels {limits.max_pixels} is too large: {found}")
        logger.warning("%s: larger images are refused where their format needs more memory", found)
    return limits
