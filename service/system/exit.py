"""How a server's processes end."""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rednet.service.system.terminal import printable


def end(status: int) -> NoReturn:
    """Exit without finalising the interpreter. The engine's thread may still be inside torch, in a long batch or in
    warm-up, and the C++ runtime aborts a process that is finalised while such a thread runs.
    """
    logging.shutdown()
    atexit._run_exitfuncs()  # writes the last log lines
    os._exit(status)


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run the main function of a process, and exit with its status, or with 2 for errors that users can fix."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"rednet: {printable(error)}", file=sys.stderr)
        status = 2
    end(status)
