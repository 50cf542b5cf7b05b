"""The engine's process: torch, the devices and the batches. It admits no requests, and knows no HTTP.

python -m rednet.service.processes.engine OPTIONS

OPTIONS is the JSON of `EngineOptions`.
"""

import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rednet.service.build import build_engine
from rednet.service.engine.engine import HUNG_S, Engine
from rednet.service.engine.messages import ONLY_HELLO, Hello, Ready, frame
from rednet.service.engine.slots import SlotLayout, Slots
from rednet.service.engine.socket_inbox import FrontEndLink, SocketInbox
from rednet.service.network import Network, load_network
from rednet.service.observability import log
from rednet.service.observability.metrics import Metrics
from rednet.service.processes.options import EngineOptions
from rednet.service.settings import Settings
from rednet.service.system.exit import run_process
from rednet.service.types import State

logger = logging.getLogger("rednet.service.processes.engine")  # not `__main__`

POLL_S = 0.05  # how often the engines' state is looked at
GREETING_TIMEOUT_S = 1.0
CONTROL_BYTES = 4096
LAST_BATCH_S = 1.0  # how long the end waits for running batches


@dataclass(frozen=True, slots=True)
class _Device:
    """The engine of one device, and where front ends reach it."""

    engine: Engine
    inbox: SocketInbox


@dataclass(frozen=True, slots=True)
class _Greeted:
    """A front end that waits for the end of warm-up."""

    connection: socket.socket
    slots: Slots
    device: _Device


class EngineHost:
    """Connects front ends with the engines of this process.

    Args:
        settings: the options of the server.
        network: that is served.
        started: when this process was started, by `time.monotonic()`.
        hung_s: a batch that takes longer means that its device hangs.
    """

    def __init__(self, settings: Settings, network: Network, started: float, hung_s: float = HUNG_S) -> None:
        metrics = Metrics()
        self._started = started
        energies = list(network.familiarity.energies) if network.familiarity else None
        self._hello = Hello(network.description.model_dump(), len(network.runners), network.gpus, energies)
        self._layout = SlotLayout.of(self._hello.model)
        self._devices: list[_Device] = []
        for name in network.runners:
            inbox = SocketInbox()
            self._devices.append(_Device(build_engine(settings, network, name, metrics, hung_s, inbox), inbox))
        self._greeted: list[_Greeted] = []
        self._count = 0  # of front ends so far
        self._ready: list[Ready] = []
        self._stopping = threading.Event()

    def run(self, listener: socket.socket, control: socket.socket) -> int:
        """Serve front ends until `stop`, or until the supervisor or an engine is gone; returns the exit status.

        Args:
            listener: accepts front ends.
            control: to the supervisor; `child.py` has the protocol.
        """
        for device in self._devices:
            device.engine.start()
        control.send(b"up\n")
        while not self._stopping.is_set():
            for each in select.select([listener, control], (), (), POLL_S)[0]:
                if each is listener:
                    self._greet(listener.accept()[0])
                else:
                    self._obey(control)
            states = {device.engine.state for device in self._devices}
            if State.FAILED in states:
                return 1
            if states == {State.READY}:
                if not self._ready:
                    self._note_readiness()
                    control.send(b"ready\n")
                self._connect_greeted()
        for device in self._devices:
            device.engine.stop(LAST_BATCH_S)
        return 0

    def _obey(self, control: socket.socket) -> None:
        command = control.recv(CONTROL_BYTES)
        if not command:
            logger.error("the supervisor is gone")
        if not command or b"stop" in command:
            self.stop()
        else:  # a ping
            control.send(b"pong\n")

    def stop(self) -> None:
        """Make `run` return soon, from any thread."""
        self._stopping.set()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(GREETING_TIMEOUT_S)
            data, fds, _, _ = socket.recv_fds(connection, 1, 1)
            connection.sendall(frame(self._hello))
            if data == bytes([ONLY_HELLO]):
                connection.close()
                return
            slots = Slots(self._layout, fds[0])
            os.close(fds[0])
            self._greeted.append(_Greeted(connection, slots, self._devices[data[0]]))
        except (OSError, ValueError, IndexError) as error:
            logger.warning("a front end did not connect: %s", error)
            connection.close()

    def _note_readiness(self) -> None:
        start_s = time.monotonic() - self._started
        for costs in (device.engine.costs for device in self._devices):
            seconds = {str(size): time_s for size, time_s in costs.seconds.items()}
            self._ready.append(Ready(seconds, costs.max_batch_size, start_s))

    def _connect_greeted(self) -> None:
        """Hand the front ends that have connected to the engines' threads."""
        for each in self._greeted:
            try:
                each.connection.sendall(frame(self._ready[self._devices.index(each.device)]))
            except OSError:  # it is gone again
                each.connection.close()
                continue
            each.connection.setblocking(False)
            engine = each.device.engine
            link = FrontEndLink(each.connection, each.slots, self._count, engine)
            each.device.inbox.put(link)
            self._count += 1
        self._greeted.clear()


def main(load: Callable[[Settings], Network] = load_network) -> int:
    """Run the process.

    Args:
        load: the network that is served.
    """
    options = EngineOptions.from_json(sys.argv[1])
    settings = options.read_settings()
    log.configure(settings.log_level, settings.log_format)
    network = load(settings)
    network.log()
    host = EngineHost(settings, network, options.started)
    return host.run(socket.socket(fileno=options.listener), socket.socket(fileno=options.control))


if __name__ == "__main__":
    run_process(main)
