"""Wires everything that answers images: the one place for it. Imports no torch."""

import logging
from typing import TYPE_CHECKING

from rednet.service.decoding.decoder import Decoder
from rednet.service.decoding.limits import DecodeLimits, memory_for_decoders
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.client import LocalClient
from rednet.service.engine.engine import HUNG_S, Engine
from rednet.service.observability.metrics import DeviceEvents, Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores

if TYPE_CHECKING:
    from rednet.service.network import Network

logger = logging.getLogger(__name__)


def build(
    settings: Settings, network: "Network", metrics: Metrics, decode_limits: DecodeLimits, hung_s: float = HUNG_S
) -> Pipeline:
    """Build everything that answers images, behind the pipeline, which is not started yet.

    Args:
        settings: the options.
        network: what answers them.
        metrics: records what happens.
        decode_limits: on images, and on the memory of the decoders.
        hung_s: a batch that takes longer means that its device hangs.
    """
    engines = [
        Engine(runner, Batcher(1, settings.max_wait_ms / 1000), DeviceEvents(metrics, device), hung_s)
        for device, runner in network.runners.items()
    ]
    decoder = Decoder(network.preprocess, decode_limits, _decoders(settings))
    return Pipeline(network.description, LocalClient(engines, settings.max_queue), decoder, metrics)


def _decoders(settings: Settings) -> int:
    return usable_cores() if settings.decoders == "auto" else settings.decoders


def decode_limits(settings: Settings) -> DecodeLimits:
    """The limits of decoding on this machine, with the memory that this process has left.

    Raises:
        ValueError: the memory does not suffice for an image of --max-pixels, which was asked for.
    """
    limits = DecodeLimits.derive(settings.max_pixels, memory_for_decoders(), _decoders(settings))
    if limits.largest_pixels < limits.max_pixels:
        found = f"there is memory to decode {limits.largest_pixels} pixels in every format, not {limits.max_pixels}"
        if "max_pixels" in settings.model_fields_set:
            raise ValueError(f"--max-pixels {limits.max_pixels} is too large: {found}")
        logger.warning("%s: larger images are refused where their format needs more memory", found)
    return limits
