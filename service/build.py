"""Loads the network and wires everything that answers images: the one place for both."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rednet import Checkpoint, Prepared, Preprocess, load_checkpoint, prepare
from rednet.model.inference.preparation import resolve_device
from rednet.service.decoding.decoder import Decoder
from rednet.service.decoding.limits import DecodeLimits, memory_for_decoders
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.client import LocalClient
from rednet.service.engine.engine import HUNG_S, Engine
from rednet.service.engine.runner import PreparedRunner, driver_name, set_threads
from rednet.service.model_description import ModelBody, describe
from rednet.service.observability.gpus import watch_gpus
from rednet.service.observability.metrics import DeviceEvents, Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores
from rednet.service.types import ModelRunner

logger = logging.getLogger(__name__)

# The largest batch that `--max-batch-size auto` chooses; warm-up stops earlier where larger batches gain nothing.
MAX_AUTO_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is ready to be served.

    Attributes:
        description: what `/v1/model` answers.
        preprocess: turns photos into its input.
        runners: by device, what makes the device's runner; called on the engine's thread.
        gpus: the CUDA devices among them, with the names that the driver gives them.
    """

    description: ModelBody
    preprocess: Preprocess
    runners: Mapping[str, Callable[[], ModelRunner]]
    gpus: Mapping[str, str] = field(default_factory=dict)


def load_network(settings: Settings) -> Network:
    """Load the checkpoint, and prepare its network on every device that was asked for.

    Raises:
        CheckpointError, ValueError: the checkpoint or a device cannot be used.
    """
    set_threads(_threads(settings))
    checkpoint = load_checkpoint(settings.checkpoint)
    prepared = _prepare_each(checkpoint, settings)
    description = describe(checkpoint, prepared)
    if settings.model_name is not None:
        description = description.model_copy(update={"name": settings.model_name})
    return Network(
        description,
        checkpoint.preprocess,
        {str(each.device): _runner(each, settings) for each in prepared},
        {str(each.device): driver_name(each.device) for each in prepared if each.device.type == "cuda"},
    )


def build(
    settings: Settings, network: Network, decode_limits: DecodeLimits | None = None, hung_s: float = HUNG_S
) -> Pipeline:
    """Build everything that answers images, behind the pipeline, which is not started yet.

    Args:
        settings: the options.
        network: what answers them.
        decode_limits: None: those that the machine's memory allows.
        hung_s: a batch that takes longer means that its device hangs.

    Raises:
        ValueError: --max-pixels cannot be used.
    """
    metrics = Metrics()
    metrics.model(network.description)
    if network.gpus:
        watch_gpus(metrics.registry, network.gpus)
    engines = [
        Engine(runner, Batcher(1, settings.max_wait_ms / 1000), DeviceEvents(metrics, device), hung_s)
        for device, runner in network.runners.items()
    ]
    decoders = usable_cores() if settings.decoders == "auto" else settings.decoders
    decoder = Decoder(network.preprocess, decode_limits or _decode_limits(settings, decoders), decoders)
    return Pipeline(network.description, LocalClient(engines, settings.max_queue), decoder, metrics)


def _prepare_each(checkpoint: Checkpoint, settings: Settings) -> list[Prepared]:
    """The network on every device, in one precision: the best one on the first device.

    Raises:
        ValueError: a device is named twice, does not exist, or lacks that precision.
    """
    devices = [resolve_device(name.strip()) for name in settings.device.split(",")]
    if len({(device.type, device.index or 0) for device in devices}) < len(devices):
        raise ValueError(f"--device {settings.device} names one device twice")
    prepared: list[Prepared] = []
    for device in devices:
        precision = prepared[0].precision if prepared else settings.precision
        prepared.append(prepare(checkpoint.net, checkpoint.preprocess, device, precision, checkpoint.calibration))
    return prepared


def _runner(prepared: Prepared, settings: Settings) -> Callable[[], ModelRunner]:
    wanted = settings.max_batch_size
    largest = min(settings.max_queue, MAX_AUTO_BATCH[prepared.device.type] if wanted == "auto" else wanted)
    return lambda: PreparedRunner(prepared, largest, auto=wanted == "auto")


def _threads(settings: Settings) -> int:
    """As many as asked for, but no more than the machine has cores: more would only wait for each other."""
    cores = os.cpu_count() or 1
    if settings.threads == "auto":
        return usable_cores()
    if settings.threads > cores:
        logger.warning("--threads %d: using %d, the number of cores", settings.threads, cores)
    return min(settings.threads, cores)


def _decode_limits(settings: Settings, decoders: int) -> DecodeLimits:
    """The limits of decoding on this machine.

    Raises:
        ValueError: the memory does not suffice for an image of --max-pixels, which was asked for.
    """
    limits = DecodeLimits.derive(settings.max_pixels, memory_for_decoders(), decoders)
    if limits.largest_pixels < limits.max_pixels:
        found = f"there is memory to decode {limits.largest_pixels} pixels in every format, not {limits.max_pixels}"
        if "max_pixels" in settings.model_fields_set:
            raise ValueError(f"--max-pixels {limits.max_pixels} is too large: {found}")
        logger.warning("%s: larger images are refused where their format needs more memory", found)
    return limits
