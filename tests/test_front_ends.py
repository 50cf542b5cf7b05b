"""A server of several processes, as users run it: front ends, and one engine."""

import hashlib
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from rednet import load_checkpoint, save_checkpoint
from tests.conftest import encoded, photo
from tests.processes import module_pids
from tests.servers import PATIENCE_S, ServerProcess, free_port, wait_until

pytestmark = pytest.mark.slow

JPEG = encoded(photo(1), "JPEG")
ENGINE, FRONT_END, EVERY = "engine", "front_end", ""
# A supervisor that finds out sooner that a process hangs.
IMPATIENT = """
import rednet.service.processes.supervisor as supervisor
from rednet.service.cli.parser import main

supervisor.HUNG_S = 2.0
raise SystemExit(main())
"""


def processes(server: ServerProcess, module: str) -> list[int]:
    """The server's processes that run a module."""
    return module_pids(server.process.pid, module)


def predict(server: ServerProcess, **headers: str) -> httpx.Response:
    """A photo over a connection of its own."""
    headers = {"Content-Type": "image/jpeg", "Connection": "close"} | headers
    return httpx.post(f"{server.url}/v1/predict", content=JPEG, headers=headers, timeout=PATIENCE_S)


def kill(pid: int) -> None:
    """Kill a process, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of a process")


def metric(server: ServerProcess, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", server.client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--frontends", 2, "--precision", "fp32") as running:
        yield running


@pytest.fixture(scope="module")
def single() -> Iterator[ServerProcess]:
    with ServerProcess("--frontends", 1, "--precision", "fp32") as running:
        yield running


def without_times(answer: httpx.Response) -> Mapping[str, object]:
    return {name: value for name, value in answer.json().items() if name not in ("cost_s", "max_batch_size")}


@pytest.mark.parametrize(
    "path", ["/v1/predict", "/v1/features", "/v1/explain?class=1", "/v1/model", "/v2/models/rednet26-imagenette"]
)
def test_answers_are_those_of_a_single_process(server: ServerProcess, single: ServerProcess, path: str) -> None:
    """Pixels, logits, features and maps cross between processes unchanged, and so does the description."""

    def ask(which: ServerProcess) -> httpx.Response:
        if path.startswith(("/v1/model", "/v2")):
            return which.client.get(path)
        headers = {"Content-Type": "image/jpeg", "Accept": "application/json"}
        return which.client.post(path, content=JPEG, headers=headers)

    expected, found = ask(single), ask(server)
    assert found.status_code == expected.status_code == 200
    assert without_times(found) == without_times(expected)


def test_normalised_float_pixels_reach_the_engine(server: ServerProcess) -> None:
    side = server.client.get("/v1/model").json()["preprocess"]["crop"]
    pixels = np.linspace(-2, 2, 3 * side * side, dtype=np.float32)
    body = {
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, side, side], "data": pixels.tolist()}],
        "outputs": [{"name": "logits"}],
    }
    answer = server.client.post("/v2/models/rednet26-imagenette/infer", json=body)
    assert answer.status_code == 200
    logits = answer.json()["outputs"][0]["data"]
    assert len(logits) == 10
    assert np.ptp(logits) > 0.1


def test_metrics_of_any_front_end_count_the_requests_of_all(server: ServerProcess) -> None:
    series = 'rednet_images_total{endpoint="/v1/predict",outcome="ok"}'
    before = metric(server, series)
    for _ in range(10):
        assert predict(server).status_code == 200
    assert metric(server, series) == before + 10
    assert metric(server, "rednet_queue_depth") == 0
    digits = server.client.get("/v1/model").json()["checkpoint_sha256"][:12]
    described = f'rednet_model_info{{architecture="rednet26",checkpoint="{digits}",device="cpu"'
    assert described in server.client.get("/metrics").text


def test_process_metrics_are_sums_over_the_processes(server: ServerProcess) -> None:
    """The engine alone needs more memory than a front end."""
    engine = int(Path(f"/proc/{processes(server, ENGINE)[0]}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert metric(server, "process_resident_memory_bytes") > engine + 2 * 30e6
    assert metric(server, "process_cpu_seconds_total") > 1


def test_connections_are_shared_evenly(server: ServerProcess) -> None:
    """The kernel would give all connections of a moment to one process."""

    def sockets(pid: int) -> int:
        links = (os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists())
        return sum(link.startswith("socket:") for link in links)

    front_ends = processes(server, FRONT_END)
    before = [sockets(pid) for pid in front_ends]
    clients = [httpx.Client(base_url=server.url) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert {answer.status_code for answer in pool.map(lambda client: client.get("/livez"), clients)} == {200}
    opened = [sockets(pid) - known for pid, known in zip(front_ends, before, strict=True)]
    for client in clients:
        client.close()
    assert sum(opened) == 20
    assert min(opened) >= 7


def test_front_ends_do_not_load_torch(server: ServerProcess) -> None:
    """It would cost each of them some 200 MB."""
    assert len(processes(server, FRONT_END)) == 2
    for pid in processes(server, FRONT_END):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{processes(server, ENGINE)[0]}/maps").read_text()


def test_a_front_end_that_is_killed_is_replaced(server: ServerProcess) -> None:
    """Requests at the other one are not affected, and counters do not go back."""
    series = 'rednet_images_total{endpoint="/v1/predict",outcome="ok"}'
    before, victim = metric(server, series), processes(server, FRONT_END)[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(set(processes(server, FRONT_END)) - {victim}) == 2, "another front end")
    assert [predict(server).status_code for _ in range(4)] == [200] * 4
    assert metric(server, series) == before + 4
    assert metric(server, "rednet_inflight_requests") == 1  # the scrape


def test_images_of_an_engine_that_is_killed_are_answered_by_the_next(server: ServerProcess) -> None:
    """If their deadline allows; new requests are refused meanwhile, and told when to come back."""
    engine = processes(server, ENGINE)[0]
    with ThreadPoolExecutor(8) as pool:
        os.kill(engine, signal.SIGSTOP)
        waiting = [pool.submit(predict, server) for _ in range(8)]
        wait_until(lambda: metric(server, "rednet_queue_depth") == 8, "images in the queue")
        time.sleep(0.2)  # they have been decoded, too
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: server.client.get("/readyz").status_code == 503, "the end of the engine")
        refused = predict(server)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert int(refused.headers["Retry-After"]) >= 1
        assert server.client.get("/livez").status_code == 200
        assert [each.result().status_code for each in waiting] == [200] * 8
    wait_until(lambda: server.client.get("/readyz").status_code == 200, "another engine")
    assert metric(server, "rednet_queue_depth") == 0


def test_images_that_cannot_wait_for_another_engine_are_refused_at_once(server: ServerProcess) -> None:
    engine = processes(server, ENGINE)[0]
    with ThreadPoolExecutor(1) as pool:
        os.kill(engine, signal.SIGSTOP)
        waiting = pool.submit(predict, server, **{"X-Request-Timeout-Ms": "1500"})
        wait_until(lambda: metric(server, "rednet_queue_depth") == 1, "the image in the queue")
        time.sleep(0.2)
        os.kill(engine, signal.SIGKILL)
        answer = waiting.result()
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    wait_until(lambda: server.client.get("/readyz").status_code == 200, "another engine")


def other_checkpoint(path: Path) -> None:
    """Write the embedded network under other names of its classes."""
    checkpoint = load_checkpoint()
    labels = [label._replace(name=f"another {label.name}") for label in checkpoint.labels]
    save_checkpoint(path, replace(checkpoint, labels=labels, name="another"), replace=True)


def test_sighup_switches_all_front_ends_to_the_checkpoint_as_it_is_now(tmp_path: Path) -> None:
    """Without a lost request; every answer is wholly of one network, and nothing is left of the process before."""
    path = tmp_path / "served.safetensors"
    save_checkpoint(path, load_checkpoint())
    answers: Counter[tuple[int, str, bool]] = Counter()
    stop = threading.Event()

    def ask(server: ServerProcess) -> None:
        while not stop.is_set():
            answer = predict(server)
            body = answer.json()
            label = body["predictions"][0]["classes"][0]["label"]
            answers[answer.status_code, body["model"], label.startswith("another ")] += 1

    with ServerProcess("--frontends", 2, "--checkpoint", path) as server, ThreadPoolExecutor(4) as pool:
        before = processes(server, ENGINE)
        try:
            asking = [pool.submit(ask, server) for _ in range(4)]
            other_checkpoint(path)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "has answered its last request" in server.log, "the other network")
            wait_until(lambda: answers[200, "another", True] >= 20, "answers of the other network")
        finally:
            stop.set()
        for each in asking:
            each.result()
        assert answers.keys() == {(200, "rednet26-imagenette", False), (200, "another", True)}
        assert not set(before) & set(processes(server, ENGINE))
        assert len(processes(server, ENGINE)) == 1
        assert 'name="another"' in server.client.get("/metrics").text
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert {server.client.get("/v1/model").json()["checkpoint_sha256"] for _ in range(4)} == {digest}
        assert metric(server, "rednet_queue_depth") == 0
        os.kill(processes(server, FRONT_END)[0], signal.SIGKILL)
        wait_until(lambda: len(processes(server, FRONT_END)) == 2, "another front end")
        assert {predict(server).json()["model"] for _ in range(4)} == {"another"}


def test_sighup_keeps_the_network_if_the_checkpoint_is_broken(tmp_path: Path) -> None:
    """API keys are loaded again in any case."""
    path, keys = tmp_path / "served.safetensors", tmp_path / "keys"
    save_checkpoint(path, load_checkpoint())
    keys.write_text("first:0123456789abcdef\n")
    with ServerProcess("--frontends", 2, "--checkpoint", path, "--api-key-file", keys) as server:
        engine = processes(server, ENGINE)
        broken = tmp_path / "broken"
        broken.write_bytes(b"no weights")
        broken.replace(path)
        keys.write_text("second:fedcba9876543210\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the checkpoint was not loaded" in server.log, "the end of the reload")
        assert processes(server, ENGINE) == engine
        failures = 'rednet_reloads_total{outcome="failed",what="checkpoint"}'
        wait_until(lambda: metric(server, failures) == 2, "the failure, counted by each front end")
        for _ in range(4):
            assert predict(server, Authorization="Bearer fedcba9876543210").status_code == 200
            assert predict(server, Authorization="Bearer 0123456789abcdef").status_code == 401


def test_front_ends_serve_grpc() -> None:
    """Each of them, at the same port."""
    grpc = pytest.importorskip("grpc", reason="the extra [grpc] is not installed")
    pytest.importorskip("google.rpc", reason="the extra [grpc] is not installed")
    port = free_port()
    with ServerProcess("--frontends", 2, "--grpc-port", port) as server:
        for _ in range(8):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                assert live(b"") == b"\x08\x01"  # live: true
        os.kill(processes(server, FRONT_END)[0], signal.SIGKILL)
        wait_until(lambda: len(processes(server, FRONT_END)) == 2, "another front end")
        wait_until(lambda: server.log.count("running gRPC on") == 3, "its port")


def test_sigterm_answers_what_was_accepted_and_leaves_nothing_behind() -> None:
    with ServerProcess("--frontends", 2) as server:
        engine, front_ends = processes(server, ENGINE)[0], processes(server, FRONT_END)
        environment = Path(f"/proc/{engine}/environ").read_text().split("\0")
        folder = next(Path(each.partition("=")[2]) for each in environment if each.startswith("PROMETHEUS_"))
        assert folder.is_dir()
        with ThreadPoolExecutor(8) as pool:
            os.kill(engine, signal.SIGSTOP)
            waiting = [pool.submit(predict, server) for _ in range(8)]
            wait_until(lambda: metric(server, "rednet_queue_depth") == 8, "images in the queue")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
            os.kill(engine, signal.SIGCONT)
            assert [each.result().status_code for each in waiting] == [200] * 8
        assert server.process.wait(PATIENCE_S) == 0
        assert server.log.count("SIGTERM: new requests are refused; images still to be answered: 8") == 1
        assert server.log.count("new requests are refused") == 1
        assert not [pid for pid in (engine, *front_ends) if Path(f"/proc/{pid}").exists()]
        assert not folder.exists()


def test_sigterm_to_all_processes_is_one_to_the_supervisor() -> None:
    """Service managers send it to all at once; the engine is needed until the last answer is out."""
    with ServerProcess("--frontends", 2) as server:
        engine = processes(server, ENGINE)[0]
        with ThreadPoolExecutor(8) as pool:
            os.kill(engine, signal.SIGSTOP)
            waiting = [pool.submit(predict, server) for _ in range(8)]
            wait_until(lambda: metric(server, "rednet_queue_depth") == 8, "images in the queue")
            for pid in (server.process.pid, *processes(server, EVERY)):
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
            os.kill(engine, signal.SIGCONT)
            assert [each.result().status_code for each in waiting] == [200] * 8
        assert server.process.wait(PATIENCE_S) == 0


def test_a_second_sigterm_ends_the_server_at_once() -> None:
    with ServerProcess("--frontends", 2) as server:
        pids = processes(server, EVERY)
        with ThreadPoolExecutor(1) as pool:
            os.kill(processes(server, ENGINE)[0], signal.SIGSTOP)
            refused = pool.submit(predict, server)
            wait_until(lambda: metric(server, "rednet_queue_depth") == 1, "the image in the queue")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE_S) == 1
            assert refused.result().status_code == 503
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_processes_end_with_their_supervisor() -> None:
    with ServerProcess("--frontends", 2) as server:
        pids = processes(server, EVERY)
        assert len(pids) == 3
        server.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of its processes")


@pytest.mark.parametrize("module", [ENGINE, FRONT_END])
def test_a_process_that_hangs_is_replaced(module: str) -> None:
    with ServerProcess("--frontends", 2, script=IMPATIENT) as server:
        victim = processes(server, module)[0]
        count = len(processes(server, module))
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: not Path(f"/proc/{victim}").exists(), "its end")
        wait_until(lambda: len(processes(server, module)) == count, "another one")
        wait_until(lambda: predict(server).status_code == 200, "an answer")


def test_an_engine_that_ends_again_and_again_ends_the_server() -> None:
    with ServerProcess("--frontends", 2) as server:
        for _ in range(3):
            wait_until(lambda: bool(processes(server, ENGINE)), "an engine")
            kill(processes(server, ENGINE)[0])
        assert server.process.wait(PATIENCE_S) == 1
        assert "giving up" in server.log


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    """With the message and the exit status of a single process."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(AssertionError, match=r"rednet: .*broken\.safetensors") as failure:
        ServerProcess("--frontends", 2, "--checkpoint", broken)
    assert str(failure.value).count("rednet: ") == 1
