"""Fused convolutions where cuDNN supports them, separate operations elsewhere."""

import logging

import pytest
import torch
from torch import Tensor

from rednet.model.inference.cuda.conv_fallback import MAX_KEYS, ConvFallback


def unsupported() -> Tensor:
    raise RuntimeError("no engine was found")


def test_unsupported_convolution_is_tried_once_per_shape(caplog: pytest.LogCaptureFixture) -> None:
    """The failure is logged once per shape."""
    tries = []

    def fused() -> Tensor:
        tries.append(1)
        raise RuntimeError("no engine was found")

    caplog.set_level(logging.DEBUG)
    fallback = ConvFallback()
    for _ in range(3):
        assert fallback.run("a shape", fused, lambda: torch.ones(2)).tolist() == [1, 1]
    assert (len(tries), len(caplog.records)) == (1, 1)
    assert fallback.run("another", lambda: torch.zeros(1), lambda: torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_memory_and_device_errors_are_raised_and_not_remembered(error: type[Exception]) -> None:
    """Memory may be available later, and separate operations would not recover a lost device."""

    def fused() -> Tensor:
        raise error

    fallback = ConvFallback()
    with pytest.raises(error):
        fallback.run("a shape", fused, lambda: torch.ones(1))
    assert fallback.run("a shape", lambda: torch.zeros(1), lambda: torch.ones(1)).tolist() == [0]


def test_unsupported_shapes_are_remembered_per_network() -> None:
    """Another network may run on another device."""
    ConvFallback().run("a shape", unsupported, lambda: torch.ones(1))
    assert ConvFallback().run("a shape", lambda: torch.zeros(1), lambda: torch.ones(1)).tolist() == [0]


def test_remembered_shapes_are_bounded() -> None:
    """A program that varies image sizes does not grow without bound."""
    fallback = ConvFallback()
    for shape in range(MAX_KEYS + 10):
        fallback.run(shape, unsupported, lambda: torch.ones(1))
    assert len(fallback._unsupported) == MAX_KEYS
