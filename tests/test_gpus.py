"""GPU metrics of the NVIDIA driver."""

import logging

import pytest
import torch
from prometheus_client import CollectorRegistry

from rednet.service.observability.gpus import GpuCollector, watch_gpus

NO_DRIVER = not torch.cuda.is_available()


@pytest.mark.skipif(not NO_DRIVER, reason="there is a driver here")
def test_gpu_metrics_are_absent_without_a_driver(caplog: pytest.LogCaptureFixture) -> None:
    """The log gives the reason, and neither start nor scrape fails."""
    registry = CollectorRegistry()
    with caplog.at_level(logging.WARNING):
        watch_gpus(registry, {"cuda": "GPU-0"})
    assert "no metrics of device memory and utilisation" in caplog.text
    assert list(registry.collect()) == []
    assert [family.samples for family in GpuCollector({"cuda": "GPU-0"}).collect()] == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(NO_DRIVER, reason="no CUDA device here")
def test_gpu_memory_and_utilisation_are_those_of_the_device() -> None:
    """Used memory includes what this process holds."""
    from rednet.service.engine.runner import driver_name

    device = torch.device("cuda")
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    registry = CollectorRegistry()
    watch_gpus(registry, {"cuda": driver_name(device)})
    used = registry.get_sample_value("rednet_device_memory_bytes", {"device": "cuda"})
    assert used is not None
    assert used >= held.numel()
    utilisation = registry.get_sample_value("rednet_device_utilization_ratio", {"device": "cuda"})
    assert utilisation is not None
    assert 0 <= utilisation <= 1
