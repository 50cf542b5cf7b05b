"""The fast way where it works, else the sure one."""

import logging

import pytest
import torch
from torch import Tensor

from model.fallback import first_that_runs


def test_what_fails_once_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """With a line in the log; other shapes are tried on their own."""
    tries = []

    def fast() -> Tensor:
        tries.append(1)
        raise RuntimeError("no engine was found")

    caplog.set_level(logging.DEBUG)
    for _ in range(3):
        assert first_that_runs("a shape", fast, lambda: torch.ones(2)).tolist() == [1, 1]
    assert (len(tries), len(caplog.records)) == (1, 1)
    assert first_that_runs("another", lambda: torch.zeros(1), lambda: torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_another_way_would_not_mend_is_passed_on(error: type[Exception]) -> None:
    """Memory may be free again next time; a device that was lost is lost for both ways."""

    def fast() -> Tensor:
        raise error

    with pytest.raises(error):
        first_that_runs("a third shape", fast, lambda: torch.ones(1))
    assert first_that_runs("a third shape", lambda: torch.zeros(1), lambda: torch.ones(1)).tolist() == [0]
