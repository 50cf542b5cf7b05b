"""Metrics of CUDA devices, read through NVML."""

import logging
from collections.abc import Iterable, Mapping

import pynvml
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)


class GpuCollector(Collector):
    """Memory and utilisation of devices, read on every scrape.

    Args:
        uuids: the driver's name of each device (`GPU-...`), by its name in the metrics.
    """

    def __init__(self, uuids: Mapping[str, str]) -> None:
        self._uuids = uuids

    def collect(self) -> Iterable[GaugeMetricFamily]:
        text = "Memory of the device in use by all processes."
        used = GaugeMetricFamily("rednet_device_memory_bytes", text, labels=("device",))
        text = "Share of the recent past in which the device was computing, for any process."
        busy = GaugeMetricFamily("rednet_device_utilization_ratio", text, labels=("device",))
        for device, uuid in self._uuids.items():
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                used.add_metric((device,), pynvml.nvmlDeviceGetMemoryInfo(handle).used)
                busy.add_metric((device,), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except pynvml.NVMLError:  # a part of a device (MIG) has no utilisation; its memory is reported
                log.debug("NVML has no values for %s", device, exc_info=True)
        return used, busy


def watch_gpus(registry: CollectorRegistry, uuids: Mapping[str, str]) -> None:
    """Add the devices to the metrics, if the driver is accessible: a container may not be allowed to use it."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("no metrics of device memory and utilisation: %s", error)
        return
    registry.register(GpuCollector(uuids))


def count_gpus() -> int:
    """The number of NVIDIA devices of this machine, without loading CUDA."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
