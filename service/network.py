"""Loads the network that is served, and prepares it on every device."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rednet import Checkpoint, Familiarity, Prepared, Preprocess, load_checkpoint, prepare
from rednet.model.inference.preparation import resolve_device
from rednet.service.engine.runner import PreparedRunner, driver_name, release_device_memory, set_threads
from rednet.service.model_description import ModelBody, describe
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores
from rednet.service.system.memory import release_free_memory
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
        familiarity: tells from logits how familiar an image looks; None: not measured.
    """

    description: ModelBody
    preprocess: Preprocess
    runners: Mapping[str, Callable[[], ModelRunner]]
    gpus: Mapping[str, str] = field(default_factory=dict)
    familiarity: Familiarity | None = None

    def log(self) -> None:
        """Log what is served, and which backends were rejected."""
        for reason in self.description.passed_over:
            logger.warning("rejected backend: %s", reason)
        logger.info("serving %s", self.description.summary())


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
        checkpoint.familiarity,
    )


def release_memory() -> None:
    """Give the memory of networks that are not used any more back to the system."""
    release_device_memory()
    release_free_memory()


def _prepare_each(checkpoint: Checkpoint, settings: Settings) -> list[Prepared]:
    """The network on every device, in one precision: the best one on the first device.

    Raises:
        ValueError: a device is named twice, does not exist, or lacks that precision.
    """
    names = [name.strip() for name in settings.device.split(",")]
    devices = [resolve_device(name) for name in names]
    if len({(device.type, device.index or 0) for device in devices}) < len(devices):
        raise ValueError(f"--device {settings.device} names one device twice")
    prepared: list[Prepared] = []
    for name in names:  # not the resolved device: `auto` includes the CPU if the GPU cannot be used
        precision = prepared[0].precision if prepared else settings.precision
        prepared.append(prepare(checkpoint.net, checkpoint.preprocess, name, precision, checkpoint.calibration))
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
