"""The init process of a container: forwards signals and reaps orphans.

The kernel drops every signal to PID 1 that has no handler, and makes PID 1 the parent of all orphaned processes. In a
container `rednet` is PID 1, and it spends seconds importing PyTorch before it can handle a signal. So it forks first:
the child does the work as an ordinary process, and the parent is the init process.
"""

import os
import signal

FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
}


def fork_if_init() -> None:
    """Return in an ordinary process: if this process is PID 1, fork, return in the child, and stay as init."""
    if os.getpid() != 1:
        return
    # Blocked signals stay pending, even those that the kernel would drop; `_run_init` takes them one by one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        os.setsid()  # without this, Ctrl-C would reach the child twice: from the terminal and from its parent
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_run_init(child))


def _run_init(child: int) -> int:
    """Forward signals to the child and reap processes until the child ends.

    Returns:
        The child's exit status, as a shell reports it.
    """
    while True:
        received = signal.sigwait({*FORWARDED, signal.SIGCHLD})
        if received != signal.SIGCHLD:
            os.kill(child, received)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            process, status = ended
            if process == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
