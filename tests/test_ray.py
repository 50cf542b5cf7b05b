"""The application in Ray Serve: two nodes on this machine, HAProxy in front, and the deployment that the docs show."""

import asyncio
import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from starlette.types import Message, Receive, Scope, Send

from rednet.service.settings import SettingsError
from rednet.service.types import State
from tests.conftest import encoded, photo
from tests.http_helpers import sample
from tests.processes import descendants, is_decoder
from tests.servers import PATIENCE_S, ServerProcess, free_port, wait_until

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is absent: pip install -e '.[ray]'", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # when Ray is imported

DEPLOY = Path(__file__).resolve().parents[1] / "deploy" / "ray"
BIN = Path(sys.executable).parent
MODEL = "in-ray"
FIRST_REPLICA_PORT = free_port()
ENVIRONMENT = os.environ | {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(FIRST_REPLICA_PORT),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(FIRST_REPLICA_PORT + 50),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
REPLICA_URLS = [f"http://127.0.0.1:{FIRST_REPLICA_PORT + index}" for index in range(2)]


def write_config(path: Path, port: int) -> None:
    """The documented configuration, with a smaller queue and shorter delays."""
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    application = config["applications"][0]
    application["args"] = {"model_name": MODEL, "max_queue": 16}
    deployment = application["deployments"][0]
    deployment["ray_actor_options"]["num_cpus"] = 1
    deployment["autoscaling_config"] |= {
        "max_replicas": 2,
        "look_back_period_s": 11,
        "upscale_delay_s": 0,
        "downscale_delay_s": 2,
    }
    path.write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[int, dict[str, str]]]:
    """Two nodes, as their parent process and the environment for `serve`."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # holds Unix sockets
        environment = ENVIRONMENT | {"RAY_TMPDIR": short}
        command = [sys.executable, str(DEPLOY / "two_nodes.py"), "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout
                address = process.stdout.readline().strip().rpartition("=")[2]
                yield process.pid, environment | {"RAY_ADDRESS": address}
            finally:
                process.terminate()


@pytest.fixture(scope="module")
def ingress(nodes: tuple[int, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of HAProxy, which has one replica behind it."""
    config, port = tmp_path_factory.mktemp("ray") / "serve.yaml", free_port()
    write_config(config, port)
    deploy = [str(BIN / "serve"), "run", "--non-blocking", str(config)]
    done = subprocess.run(deploy, env=nodes[1], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        wait_until(lambda: answers(client), "HAProxy")
        yield client


def answers(client: httpx.Client, url: str = "") -> bool:
    """Whether something is ready there."""
    try:
        return client.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_replica_answers_as_rednet_serve_does(ingress: httpx.Client) -> None:
    """Classes, features, a form, and errors: the same statuses and bodies."""
    image = encoded(photo(1))
    with ServerProcess("--model-name", MODEL, "--max-queue", 16, "--threads", 1) as server:
        for url, arguments in (
            ("/v1/predict", {"content": image, "headers": {"Content-Type": "image/png"}}),
            ("/v1/predict?top_k=2", {"json": {"images": [base64.b64encode(image).decode()] * 3}}),
            ("/v1/predict", {"files": [("file", image), ("file", b"not a photo")]}),
            ("/v1/predict", {"content": b"not a photo", "headers": {"Content-Type": "image/png"}}),
            ("/v1/features", {"json": {"images": []}}),
        ):
            here = ingress.post(url, **arguments)
            there = server.client.post(url, **arguments)
            assert (here.status_code, rounded(here.json())) == (there.status_code, rounded(there.json())), url
        ours = server.client.get("/v1/model").json()
    assert ingress.get("/v1/model").json()["backend"] == ours["backend"].replace("2 threads", "1 threads")


def rounded(value: Any) -> Any:
    """A JSON value with numbers that do not depend on what else is in a batch."""
    match value:
        case dict():
            return {key: rounded(each) for key, each in value.items()}
        case list():
            return [rounded(each) for each in value]
        case float():
            return round(value, 4)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("sent", [1.0, 0.5], ids=["waiting", "uploading"])
def test_client_that_leaves_is_counted_as_499(ingress: httpx.Client, sent: float) -> None:
    """Serve cancels the request; elsewhere in the server, a cancelled request means the end of a drain, a 503."""

    def count(status: str) -> float:
        return sample(ingress, "rednet_request_duration_seconds_count", endpoint="/v1/predict", status=status)

    body = json.dumps({"images": [base64.b64encode(encoded(photo(2, 1500, 1500))).decode()] * 16}).encode()
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    left, drained = count("499"), count("503")
    with socket.create_connection((ingress.base_url.host, ingress.base_url.port or 80)) as connection:
        connection.sendall(head.encode() + body[: int(sent * len(body))])
        wait_until(lambda: sample(ingress, "rednet_inflight_requests") == 2, "the request")
    wait_until(lambda: count("499") == left + 1, "499")
    assert count("503") == drained


@pytest.mark.slow
def test_replicas_follow_the_load_and_no_request_is_lost(ingress: httpx.Client) -> None:
    """A second replica starts on the other node while most requests are refused, and stops without losing any."""
    image, stop = encoded(photo(3)), threading.Event()
    statuses: list[int] = []

    def ask(pause_s: float) -> None:
        with httpx.Client(base_url=ingress.base_url, timeout=PATIENCE_S) as client:
            while not stop.wait(pause_s):
                statuses.append(client.post("/v1/predict", files=[("file", image)] * 8).status_code)

    def run(threads: int, pause_s: float, replicas: int) -> None:
        stop.clear()
        running = [threading.Thread(target=ask, args=(pause_s,)) for _ in range(threads)]
        for each in running:
            each.start()
        try:
            wait_until(lambda: sum(answers(ingress, url) for url in REPLICA_URLS) == replicas, f"{replicas} replicas")
        finally:
            stop.set()
            for each in running:
                each.join()

    run(6, 0.0, 2)
    assert set(statuses) == {200, 429}
    statuses.clear()
    run(1, 1.0, 1)
    assert set(statuses) == {200}


@pytest.mark.slow
def test_replacement_of_a_killed_replica_answers(ingress: httpx.Client, nodes: tuple[int, dict[str, str]]) -> None:
    """Serve notices that the process is gone; its decoders end with it."""

    def processes() -> list[int]:
        return [pid for pid in descendants(nodes[0]) if is_replica(pid) or is_decoder(pid)]

    before = processes()
    for pid in filter(is_replica, before):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not set(before) & set(processes()), "the end of the replica and of its decoders")
    wait_until(lambda: any(map(is_replica, processes())) and answers(ingress), "another replica")
    assert ingress.post("/v1/predict", files=[("file", encoded(photo(4)))]).status_code == 200


def is_replica(pid: int) -> bool:
    with suppress(OSError):  # it has ended
        return b"ray::ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 8000}, "port is not an option here; the options are checkpoint, model_name"),
        ({"presicion": "int8"}, "presicion is not an option here"),
        ({"precision": "int4"}, "--precision cannot be 'int4'"),
    ],
)
def test_invalid_options_are_refused_before_deployment(options: dict[str, Any], message: str) -> None:
    """With the message in the terminal of `serve run`, and in `serve status` after `serve deploy`."""
    from rednet.service.ray import app

    with pytest.raises(SettingsError, match=message):
        app(options)


def test_health_check_waits_for_warm_up_and_fails_with_the_engine() -> None:
    """An engine cannot be made to fail from outside a replica: here is a stand-in for its pipeline."""
    from rednet.service.ray import RedNet

    check_health = RedNet.func_or_class.check_health  # type: ignore[attr-defined]
    pipeline = SimpleNamespace(state=State.STARTING)
    replica = SimpleNamespace(_pipeline=pipeline)

    async def check() -> None:
        checking = asyncio.create_task(check_health(replica))
        await asyncio.sleep(0.2)
        assert not checking.done()
        pipeline.state = State.READY
        await checking
        for state in (State.FAILED, State.NO_DECODER):
            pipeline.state = state
            with pytest.raises(RuntimeError, match=state):
                await check_health(replica)

    asyncio.run(check())


@pytest.mark.parametrize("proxy", ["HAProxy", "Serve's"])
def test_application_receives_a_disconnect_when_the_client_leaves(proxy: str) -> None:
    """Serve cancels the request; behind its own proxy, `receive` also fails before that during an upload."""
    from ray.exceptions import TaskCancelledError

    from rednet.service.ray import DisconnectOnCancel

    received: list[Message] = []

    async def receive() -> Message:
        if proxy == "Serve's":
            raise TaskCancelledError
        await asyncio.sleep(PATIENCE_S)
        raise AssertionError

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())

    async def send(message: Message) -> None:
        raise AssertionError

    async def run() -> None:
        request = asyncio.create_task(DisconnectOnCancel(application)({"type": "http"}, receive, send))
        await asyncio.sleep(0.05)
        if proxy == "HAProxy":
            request.cancel()
        await asyncio.wait((request,))
        assert request.cancelled() == (proxy == "HAProxy")

    asyncio.run(run())
    assert received == [{"type": "http.disconnect"}]


def test_import_of_the_server_does_not_import_ray() -> None:
    """Nor does Serve's controller import PyTorch, which imports the policy and the application."""
    script = "import sys, {}; sys.exit('{}' in sys.modules)"
    for imported, unwanted in (
        ("rednet.service.main, rednet.service.cli.commands", "ray"),
        ("rednet.service.ray, rednet.service.autoscaling", "torch"),
    ):
        subprocess.run([sys.executable, "-c", script.format(imported, unwanted)], check=True)
