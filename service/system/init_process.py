"""What a container's first process has to do: pass signals on and reap orphans.

The kernel drops every signal to PID 1 that has no handler, and gives it all orphaned processes as children. `rednet` is
PID 1 in a container, and imports PyTorch for seconds before it could handle a signal. So there it forks first: the
child does the work as an ordinary process, the parent is the init process.
"""

import os
import signal
import sys

PASSED_ON = {
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")
    if hasattr(signal, name)
}


def fork_if_init() -> None:
    """Return in an ordinary process: this one, or its child where this one is PID 1, which then stays as init."""
    if os.getpid() != 1 or sys.platform == "win32":
        return
    # Blocked signals wait, even those that PID 1 would lose; `_run_init` takes them one by one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        os.setsid()  # else Ctrl-C would reach it twice, from the terminal and from its parent
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_run_init(child))


def _run_init(child: int) -> int:
    """Pass signals on to the child and reap processes until the child ends; its exit status, as a shell shows it."""
    while True:
        received = signal.sigwait({*PASSED_ON, signal.SIGCHLD})
        if received != signal.SIGCHLD:
            os.kill(child, received)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            process, status = ended
            if process == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
