"""What the driver knows of CUDA devices, through NVML."""

import logging
from collections.abc import Iterable, Mapping

import pynvml
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)


class GpuCollector(Collector):
    """Memory and utilisation of devices, read whenever they are scraped.

    Args:
        uuids: the driver's name of each device (`GPU-...`), by the name that the metrics give it.
    """

    def __init__(self, uuids: Mapping[str, str]) -> None:
        self._uuids = uuids

    def collect(self) -> Iterable[GaugeMetricFamily]:
        used = GaugeMetricFamily(
            "rednet_device_memory_bytes", "Memory of the device in use, by whomever.", labels=("device",)
        )
        busy = GaugeMetricFamily(
            "rednet_device_utilization_ratio",
            "Share of the last moments in which the device was computing, by whomever's order.",
            labels=("device",),
        )
        for device, uuid in self._uuids.items():
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                used.add_metric((device,), pynvml.nvmlDeviceGetMemoryInfo(handle).used)
                busy.add_metric((device,), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except pynvml.NVMLError:  # a part of a device (MIG) has no utilisation; what it has is told
                log.debug("NVML has nothing on %s", device, exc_info=True)
        return used, busy


def watch_gpus(registry: CollectorRegistry, uuids: Mapping[str, str]) -> None:
    """Add the devices to the metrics, if the driver can be asked; a container may not be allowed to."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("no metrics of memory and utilisation: %s", error)
        return
    registry.register(GpuCollector(uuids))
