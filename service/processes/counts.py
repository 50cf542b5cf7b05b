"""How many front ends a server has."""

import os

from rednet.service.settings import Settings

# A front end's event loop answers about a thousand photos a second. A core computes at most a hundred.
CORES_PER_FRONT_END = 10
# On a GPU, the other cores share the work before and after it: of each photo, 0.7 ms in a front end and 0.9 ms in a
# decoder. One core is the engine's.
FRONT_END_SHARE = 0.44


def front_end_count(settings: Settings, cores: int, gpus: int) -> int:
    """The number of front ends; 1: a single process, front end and engine in one.

    Args:
        settings: the options.
        cores: that the server may use.
        gpus: CUDA devices of the machine.

    Raises:
        ValueError: the system lacks what several processes need.
    """
    is_possible = hasattr(os, "memfd_create")
    if settings.frontends != "auto":
        if settings.frontends > 1 and not is_possible:
            raise ValueError(f"--frontends {settings.frontends}: several front ends need Linux")
        return settings.frontends
    if not is_possible:
        return 1
    if "cuda" in settings.device or ("auto" in settings.device and gpus):
        return max(1, round((cores - 1) * FRONT_END_SHARE))
    return max(1, cores // CORES_PER_FRONT_END)
