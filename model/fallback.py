"""The fast way where it works: which shapes a library can compute in one pass is known only by trying."""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_not_fast: set[Hashable] = set()


def first_that_runs(key: Hashable, fast: Callable[[], Tensor], sure: Callable[[], Tensor]) -> Tensor:
    """What `fast` makes; where a library has no way to do it, what `sure` makes, from then on for all with that key.

    A graph that is captured later must not meet the failure, so that every shape runs once before.
    """
    if key not in _not_fast:
        try:
            return fast()
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # memory can come back, the device cannot
            raise
        except RuntimeError as error:
            log.log(logging.DEBUG if _not_fast else logging.WARNING, "in several passes, %s: %s", key, error)
            _not_fast.add(key)
    return sure()
