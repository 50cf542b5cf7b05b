"""Reloads: the network of a running server is replaced by another one, or stays if that one cannot be used."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from torch import nn

from rednet import Checkpoint, RedNet, create_rednet, save_checkpoint
from rednet.model.io.labels import Label
from rednet.service.cost_table import CostTable
from rednet.service.memory_check import MemoryCheck
from rednet.service.network import Network
from rednet.service.system import memory
from rednet.service.system.hangup import Hangups
from tests import reloads
from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, connected, occupy, predict, sample
from tests.processes import decoder_pids
from tests.servers import FakeRunner, ServerProcess, ServerThread, fake_network, wait_until

pytestmark = pytest.mark.slow

OTHERS = ("north", "east", "south")
PHOTO = encoded(photo())
KEY, OTHER_KEY = "one-key-0123456789", "another-key-0123456789"


def ready(server: ServerThread) -> None:
    wait_until(lambda: server.client.get("/readyz").status_code == 200, "readiness")


def labels(answer: httpx.Response) -> set[object]:
    return {each["label"] for each in answer.json()["predictions"][0]["classes"]}


def other_network(runner: FakeRunner | None = None) -> Network:
    return fake_network(runner or FakeRunner(), OTHERS)


def is_replaced(server: ServerThread) -> bool:
    return bool(sample(server.client, "rednet_reloads_total", what="checkpoint", outcome="ok"))


def is_rejected(server: ServerThread) -> bool:
    return bool(sample(server.client, "rednet_reloads_total", what="checkpoint", outcome="failed"))


def test_reloads_under_load() -> None:
    """The short version of `make reloads`: nothing is lost, refused or mixed up, no counter goes back, and neither
    processes nor threads are left over."""
    with reloads.server_with_checkpoints() as (server, checkpoints):
        reports = asyncio.run(reloads.run(server, checkpoints, times=2))
        assert [report.reloads for report in reports] == [2, 2, 2]
        assert reports[1].answers.keys() == reloads.CLASSES.keys()
        assert server.terminate() == 0


def test_requests_keep_the_network_that_they_began_with() -> None:
    """One is on the device, and the body of another is arriving, when the next network takes over. Afterwards the first
    network's processes are gone."""
    runner = FakeRunner()
    with ServerThread(runner, next_network=other_network) as server, ThreadPoolExecutor(1) as pool:
        ready(server)
        held = occupy(server, runner, pool)
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
        with connected(server.url, head.encode() + PHOTO[:100]) as upload:
            wait_until(lambda: server.engine_client.requests == 2, "the upload")
            server.hang_up()
            wait_until(lambda: is_replaced(server), "the next network")
            assert labels(predict(server.client, PHOTO)) == set(OTHERS)
            assert sample(server.client, "rednet_queue_depth") == 1
            upload.sendall(PHOTO[100:])
            wait_until(lambda: server.engine_client.queue_depth == 2, "the rest of the upload")
            runner.go_on.set()
            assert labels(held.result()) == {"red", "green", "blue"}
            assert b'"label":"red"' in upload.recv(10_000)
        wait_until(lambda: len(decoder_pids(os.getpid())) == 2, "the end of the first network's decoders")
        assert sample(server.client, "rednet_queue_depth") == 0


def test_everything_that_depends_on_the_network_follows_it() -> None:
    """Names, labels, shapes and the size of normalised pixels."""

    def larger() -> Network:
        network = other_network()
        preprocess = network.description.preprocess | {"crop": 40}
        return Network(
            network.description.model_copy(update={"name": "larger", "preprocess": preprocess}),
            network.preprocess,
            network.runners,
        )

    def infer(model: str, side: int) -> int:
        pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, side, side], "data": [0.0] * 3 * side**2}
        return server.client.post(f"/v2/models/{model}/infer", json={"inputs": [pixels]}).status_code

    with ServerThread(FakeRunner(), next_network=larger) as server:
        ready(server)
        assert (infer("fake", 32), infer("fake", 40), infer("larger", 40)) == (200, 400, 404)
        server.hang_up()
        wait_until(lambda: is_replaced(server), "the next network")
        assert (infer("larger", 40), infer("larger", 32), infer("fake", 32)) == (200, 400, 404)
        assert (
            server.client.get("/v1/model").json()["name"] == predict(server.client, PHOTO).json()["model"] == "larger"
        )
        assert server.client.get("/v2/models/larger").json()["inputs"][1]["shape"] == [-1, 3, 40, 40]
        described = [line for line in server.client.get("/metrics").text.splitlines() if "model_info{" in line]
        assert len(described) == 1
        assert 'name="larger"' in described[0]


@pytest.mark.parametrize("error", [ValueError("no such checkpoint"), RuntimeError("a bug")])
def test_network_that_cannot_be_loaded_leaves_the_old_one(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The log says why, with a traceback only for a bug."""

    def fails() -> Network:
        raise error

    with ServerThread(FakeRunner(), next_network=fails) as server:
        ready(server)
        server.hang_up()
        wait_until(lambda: is_rejected(server), "the failure")
        assert labels(predict(server.client, PHOTO)) == {"red", "green", "blue"}
    (record,) = [each for each in caplog.records if "was not loaded" in each.message]
    assert record.message == f"the checkpoint was not loaded, fake stays: {error}"
    assert bool(record.exc_info) == isinstance(error, RuntimeError)


def test_network_that_fails_in_warm_up_leaves_the_old_one(caplog: pytest.LogCaptureFixture) -> None:
    """Its decoders end with it."""

    class Broken(FakeRunner):
        def warm_up(self, begin: Callable[[float], None]) -> CostTable:
            raise ZeroDivisionError

    with ServerThread(FakeRunner(), next_network=lambda: other_network(Broken())) as server:
        ready(server)
        server.hang_up()
        wait_until(lambda: is_rejected(server), "the failure")
        assert labels(predict(server.client, PHOTO)) == {"red", "green", "blue"}
        assert len(decoder_pids(os.getpid())) == 2
    assert "fake stays: its warm-up failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_reloads_that_are_requested_during_one_lead_to_one_more() -> None:
    """It begins when the first one has ended: no more than two networks are in memory."""
    first, loaded = FakeRunner(), []

    def load() -> Network:
        loaded.append(len(decoder_pids(os.getpid())))
        return other_network(first if len(loaded) == 1 else None)

    first.warm.clear()
    with ServerThread(FakeRunner(), next_network=load) as server:
        ready(server)
        for turn in range(4):
            server.hang_up()
            wait_until(lambda: len(loaded) == 1, "the first reload")
            time.sleep(0.15 * (turn > 0))  # the server looks for signals ten times a second
        assert labels(predict(server.client, PHOTO)) == {"red", "green", "blue"}
        first.warm.set()
        wait_until(
            lambda: sample(server.client, "rednet_reloads_total", what="checkpoint", outcome="ok") == 2, "both reloads"
        )
        time.sleep(0.3)
        assert loaded == [2, 2]


@pytest.mark.parametrize("during", ["load", "warm-up", "drain of the old network"])
def test_sigterm_during_a_reload_drains(during: str) -> None:
    """At once, even if the reload cannot be interrupted. Admitted requests are answered, new ones are refused."""
    old, new, may_load, is_loading = FakeRunner(), FakeRunner(), threading.Event(), threading.Event()

    def load() -> Network:
        is_loading.set()
        may_load.wait()
        return other_network(new)

    with ServerThread(old, next_network=load) as server, ThreadPoolExecutor(1) as pool:
        ready(server)
        held = occupy(server, old, pool)
        server.hang_up()
        assert is_loading.wait(60)
        if during != "load":
            new.warm.clear()
            may_load.set()
            wait_until(lambda: len(decoder_pids(os.getpid())) == 4, "the next network's decoders")
        if during == "drain of the old network":
            new.warm.set()
            wait_until(lambda: is_replaced(server), "the next network")
        server.terminate()
        assert server.client.get("/readyz").json() == {"status": "draining"}
        assert predict(server.client, PHOTO).status_code == 503
        old.go_on.set()
        assert held.result().status_code == 200
        server.wait_for_end()
        assert server.exit_code == 0
        new.warm.set()
        may_load.set()
    wait_until(lambda: not decoder_pids(os.getpid()), "the end of all decoders")


def test_device_that_fails_under_the_replaced_network_ends_the_server() -> None:
    """Its requests would wait for ever, and on the same device the next network would fail, too."""
    runner = FakeRunner()
    with ServerThread(runner, hung_s=6, next_network=other_network) as server, ThreadPoolExecutor(1) as pool:
        ready(server)
        held = occupy(server, runner, pool)
        server.hang_up()
        wait_until(lambda: is_replaced(server), "the next network")
        assert held.result().status_code == 503
        server.wait_for_end()
        assert server.exit_code == 1
        runner.go_on.set()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"shop:{KEY}\n")
    return path


def test_sighup_reads_keys_and_checkpoint_again(tiny_path: Path, tmp_path: Path, key_file: Path) -> None:
    """From a folder, too, and each of them for itself: keys that cannot be read do not keep a checkpoint from being
    loaded, and the other way round."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(tiny_path)
    with ServerProcess("--checkpoint", folder, "--api-key-file", key_file) as server:

        def reload() -> None:
            before = server.log.count("SIGHUP")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: ended() == before + 1, "the reload")

        def ended() -> int:
            return server.log.count("has answered its last request") + server.log.count("checkpoint was not loaded")

        def ask(key: str) -> tuple[int, str]:
            answer = server.client.get("/v1/model", headers={"Authorization": f"Bearer {key}"})
            return answer.status_code, answer.json().get("name", "")

        assert ask(KEY) == (200, "tiny")
        assert f"requests need an API key: 1 API key in {key_file}" in server.log
        key_file.write_text("")
        (folder / "a.safetensors").unlink()
        save_checkpoint(folder / "b.safetensors", small_checkpoint("small"))
        reload()
        assert ask(KEY) == (200, "small")
        assert f"the API keys were not loaded, the old ones stay: {key_file} contains no API key" in server.log
        key_file.write_text(f"bakery:{OTHER_KEY}\n")
        (folder / "c.safetensors").symlink_to(tiny_path)
        reload()
        assert (ask(KEY)[0], ask(OTHER_KEY)) == (401, (200, "small"))
        assert f"small stays: {folder} holds 2 checkpoints, not one" in server.log
        counts = [
            sample(server.client, "rednet_reloads_total", what=what, outcome=outcome)
            for what in ("api_keys", "checkpoint")
            for outcome in ("ok", "failed")
        ]
        assert counts == [1, 1, 1, 1]
        assert server.terminate() == 0
        assert KEY not in server.log
        assert OTHER_KEY not in server.log


def small_checkpoint(name: str) -> Checkpoint:
    net: RedNet = create_rednet("rednet26", num_classes=2, base_channels=16, stem_channels=32).eval()
    return Checkpoint(net=net, labels=[Label("a", "a"), Label("b", "b")], name=name)


def test_network_that_fails_its_self_check_leaves_the_old_one(tmp_path: Path) -> None:
    """Its weights are finite, but its activations overflow."""
    good, bad = small_checkpoint("good"), small_checkpoint("bad")
    for norm in bad.net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.fill_(1e30)
    served = tmp_path / "served.safetensors"
    save_checkpoint(served, good)
    with ServerProcess("--checkpoint", served) as server:
        save_checkpoint(served, bad)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "good stays: the self-check failed" in server.log, "the failure")
        assert predict(server.client, PHOTO).json()["model"] == "good"


def test_second_network_without_memory_is_not_tried(tiny_path: Path, memory_group: Path) -> None:
    """The estimate goes by the limit of the control group. The first network was loaded all the same."""
    before = ["sh", "-c", f'echo $$ > {memory_group}/cgroup.procs && exec "$@"', "sh"]
    with ServerProcess("--checkpoint", tiny_path, "--max-pixels", 1_000_000, before=before) as server:
        used = int((memory_group / "memory.usage_in_bytes").read_text())
        (memory_group / "memory.limit_in_bytes").write_text(str(used + 30_000_000))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "tiny stays: a second network beside the first needs about" in server.log, "the refusal")
        assert predict(server.client, PHOTO).status_code == 200
        (memory_group / "memory.limit_in_bytes").write_text(str(used + 1_000_000_000))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "has answered its last request" in server.log, "the reload")


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A new v1 memory group."""
    group = Path(f"/sys/fs/cgroup/memory/rednet-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error}")
    try:
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()


def test_memory_check_grows_with_weights_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks for is the memory of the first network, three copies of the weights, and the decoders."""
    path = tmp_path / "c.safetensors"
    checkpoint = small_checkpoint("small")
    save_checkpoint(path, checkpoint, half=True)
    weights = 4 * sum(tensor.numel() for tensor in checkpoint.net.state_dict().values())
    base = memory.resident_bytes()
    held = np.ones(100_000_000, np.uint8)
    check = MemoryCheck(path, base, 2, [])
    needed = len(held) + 3 * weights + 90_000_000

    def leave(left: int) -> Callable[[], int]:
        return lambda: left

    monkeypatch.setattr("rednet.service.memory_check.available_bytes", leave(needed + 20_000_000))
    check.check()
    monkeypatch.setattr("rednet.service.memory_check.available_bytes", leave(needed - 20_000_000))
    with pytest.raises(ValueError, match=r"needs about \d+ MB of memory, and \d+ are available"):
        check.check()


def test_hangup_means_a_reload_without_a_terminal() -> None:
    """In a session of its own. The signals of a short time count as one."""
    script = "from tests.test_reload import takes; takes()"
    done = subprocess.run([sys.executable, "-c", script], start_new_session=True, check=True, capture_output=True)
    assert done.stdout.split() == [b"None", b"reload", b"None"]


def takes() -> None:
    """Print what a process makes of two signals."""
    hangups = Hangups()
    print(hangups.take())
    hangups.install()
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    print(hangups.take())
    print(hangups.take())
