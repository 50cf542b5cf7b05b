"""Real servers on free ports: as a process, or in a thread where a test must bring its own runner."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import httpx
import numpy as np

from rednet import Preprocess
from rednet.service.api_keys import KeyFile
from rednet.service.build import build
from rednet.service.cost_table import CostTable
from rednet.service.decoding.limits import DecodeLimits
from rednet.service.engine.admission import OwnCounts
from rednet.service.engine.transfer import Finished
from rednet.service.http.app import create_app
from rednet.service.http.server import OtherServer, Server, uvicorn_config
from rednet.service.model_description import LabelBody, ModelBody
from rednet.service.network import Network
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.reloading import ReloadablePipeline
from rednet.service.settings import Settings
from rednet.service.system.hangup import Hangups
from rednet.service.system.sockets import bind, grpc_addresses
from rednet.service.types import ExplainSpec, ModelRunner, Pixels, RunnerOutput, Running

REDNET = Path(sys.executable).with_name("rednet")
PATIENCE_S = 60.0
DECODER_BYTES = 4_000_000_000  # of memory for decoders
CLASSES = ("red", "green", "blue")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as the condition holds; fail when it does not within a minute."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nothing listened on a moment ago, for servers whose log cannot say which one they took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens_at(path: Path) -> bool:
    """Whether something listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def is_ready(client: httpx.Client) -> bool:
    """Whether the server takes requests; it need not listen yet."""
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


class ServerProcess:
    """`rednet serve` as users run it."""

    def __init__(
        self,
        *options: object,
        ready: bool = True,
        before: Sequence[object] = (),
        script: str = "",
        **environment: str,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115  (closed in __exit__)
        program = [sys.executable, "-c", script] if script else [REDNET]
        command = [*before, *program, "serve", "--port", "0", *options]
        variables = os.environ | environment
        self.process = subprocess.Popen([str(part) for part in command], stderr=self._log, env=variables)
        self.client = httpx.Client(timeout=PATIENCE_S)
        try:
            self._wait(ready)
        except BaseException:  # whoever failed to make one has nothing to close it with
            self.__exit__()
            raise

    def _wait(self, ready: bool) -> None:
        wait_until(lambda: self._url() is not None or self.process.poll() is not None, "the port")
        url = self._url()
        assert url is not None, self.log
        self.url = url
        self.client.base_url = url
        if ready:
            wait_until(lambda: self.client.get("/readyz").status_code == 200, "readiness")

    @property
    def grpc_address(self) -> str:
        """Where it listens for gRPC."""
        found = re.search(r"running gRPC on ([\d.:]+)", self.log)
        assert found, self.log
        return found[1]

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    def _url(self) -> str | None:
        found = re.search(r"running on (http://\S+)", self.log)
        return found[1] if found else None

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._log.close()

    def terminate(self) -> int:
        """Ask it to stop; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


class FakeRunner:
    """A runner whose answers tests can foresee: the logits are the means of the channels. It can wait or fail."""

    def __init__(self) -> None:
        self.max_batch_size = 8
        self.batches: list[int] = []
        self.warm = threading.Event()
        self.go_on = threading.Event()  # a batch waits for it
        self.running = threading.Event()  # a batch has begun
        self.fail_on: Callable[[Sequence[Pixels]], bool] = lambda _: False
        self.warm.set()
        self.go_on.set()

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        begin(0.01)
        assert self.warm.wait(PATIENCE_S)
        return CostTable({1: 0.01, 8: 0.08}, self.max_batch_size)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        self.running.set()
        assert self.go_on.wait(PATIENCE_S)
        self.batches.append(len(pixels))
        if self.fail_on(pixels):
            raise RuntimeError("a failure that the test asked for")
        means = np.stack([image.mean(axis=(1, 2), dtype=np.float32) for image in pixels])
        grid = np.arange(4, dtype=np.float32).reshape(2, 2)
        return Finished(RunnerOutput(means, means[:, :2], dict.fromkeys(specs, grid)))


def fake_network(runner: ModelRunner, classes: Sequence[str] = CLASSES) -> Network:
    """A network around a runner of the test's own."""
    preprocess = Preprocess(resize=32, crop=32)
    model = ModelBody(
        name="fake",
        server_version="0",
        architecture="none",
        parameters=0,
        config={},
        feature_channels=2,
        labels=[LabelBody(index=index, id=name, label=name) for index, name in enumerate(classes)],
        preprocess=asdict(preprocess),
        provenance={},
        device="cpu",
        precision="fp32",
        backend="a fake",
        passed_over=[],
        deviation=0.0,
    )
    return Network(model, preprocess, {"fake": lambda: runner})


class ServerThread:
    """The whole application under uvicorn in a thread, around a runner of the test's own."""

    def __init__(
        self,
        runner: ModelRunner,
        hung_s: float = PATIENCE_S,
        classes: Sequence[str] = CLASSES,
        next_network: Callable[[], Network] = lambda: fake_network(FakeRunner()),
        **options: object,
    ) -> None:
        settings = Settings.model_validate({"port": 0, "decoders": 2} | options)
        limits = DecodeLimits.derive(settings.max_pixels, DECODER_BYTES, 2)
        metrics, counts = Metrics(), OwnCounts()
        first = build(settings, fake_network(runner, classes), metrics, counts, limits, hung_s)
        self.engine_client = first.client

        def load() -> Pipeline:
            return build(settings, next_network(), metrics, counts, limits)

        pipeline = ReloadablePipeline(first, load, metrics, counts)
        keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
        self.app = create_app(settings, pipeline, keys)
        config = uvicorn_config(self.app, settings)
        other: OtherServer | None = None
        if settings.grpc_port is not None:
            from rednet.service.grpc.server import GrpcServer

            sockets = bind(settings.host, settings.grpc_port)
            (self.grpc_address,) = addresses = grpc_addresses(sockets)
            budget = self.app.state.current_context().budget
            other = GrpcServer(settings, pipeline, budget, keys, addresses, sockets)
        self._hangups = Hangups()
        self._server = Server(config, pipeline, settings.drain_timeout_s, self._hangups, pipeline.reload, other)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        wait_until(lambda: self._server.started, "the port")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.should_exit = True
        self.wait_for_end()

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call a function on the server's event loop."""
        self._server.servers[0].get_loop().call_soon_threadsafe(function)

    def terminate(self, by: signal.Signals = signal.SIGTERM) -> None:
        """What a signal would do; only a main thread gets real ones."""
        self._server.handle_exit(by, None)

    def hang_up(self) -> None:
        """What SIGHUP would do."""
        self._hangups.receive()

    @property
    def exit_code(self) -> int:
        return self._server.exit_code

    def wait_for_end(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not stop"
