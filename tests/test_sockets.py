"""Listening addresses: IPv4, IPv6, both, and unavailable ones."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from rednet.service.system.sockets import bind, bind_unix, passed_sockets, remove_unix, url
from tests.conftest import encoded, photo
from tests.http_helpers import predict
from tests.servers import PATIENCE_S, REDNET, ServerProcess, is_ready, listens_at, wait_until


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def reachable(bound: Sequence[socket.socket], stack: ExitStack) -> list[str]:
    """Those of 127.0.0.1, 127.0.0.2 and ::1 that accept connections."""
    for each in bound:
        stack.enter_context(closing(each))
        each.listen()
    reached = []
    for address in ("127.0.0.1", "127.0.0.2", "::1"):
        try:
            socket.create_connection((address, bound[0].getsockname()[1]), timeout=5).close()
        except OSError:
            continue
        reached.append(address)
    return reached


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("127.0.0.1,127.0.0.2", ["127.0.0.1", "127.0.0.2"]),
        ("127.0.0.1, 127.0.0.1", ["127.0.0.1"]),
        pytest.param("::", ["127.0.0.1", "127.0.0.2", "::1"], marks=needs_ipv6),
        pytest.param("::1", ["::1"], marks=needs_ipv6),
        pytest.param("::,127.0.0.1", ["127.0.0.1", "::1"], marks=needs_ipv6),
        pytest.param("0.0.0.0,::", ["127.0.0.1", "127.0.0.2", "::1"], marks=needs_ipv6),
        pytest.param("127.0.0.2,::1", ["127.0.0.2", "::1"], marks=needs_ipv6),
    ],
)
def test_hosts_are_served_on_one_port(hosts: str, expected: list[str]) -> None:
    """One address, several, all of IPv4, or all: `::` includes IPv4 unless an IPv4 address is given, too."""
    with ExitStack() as stack:
        assert reachable(bind(hosts, 0), stack) == expected


def test_host_name_is_served_on_its_available_addresses() -> None:
    """localhost includes ::1 unless IPv6 is disabled."""
    with ExitStack() as stack:
        assert "127.0.0.1" in reachable(bind("localhost", 0), stack)


@pytest.mark.parametrize("hosts", ["no.such.host.invalid", "192.0.2.1", "127.0.0.1,192.0.2.1", "1.2.3.4.5", "a b"])
def test_address_of_another_machine_is_rejected(hosts: str) -> None:
    """The message names it; 192.0.2.0/24 is reserved for documentation."""
    with pytest.raises(OSError, match=hosts.rpartition(",")[2]):
        bind(hosts, 0)


def test_url_has_brackets_around_an_ipv6_address() -> None:
    """Clients require them."""
    with closing(bind("127.0.0.1", 0)[0]) as bound:
        assert url(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    if has_ipv6():
        with closing(bind("::1", 0)[0]) as bound:
            assert url(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def test_port_in_use_is_reported_before_torch_is_imported(tiny_path: Path) -> None:
    """The status is 2, with one line that names the address. Importing and preparing would take several times as
    long."""
    command = [str(REDNET), "serve", "--checkpoint", str(tiny_path), "--port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        before = os.times()
        done = subprocess.run([*command, port], capture_output=True, text=True, check=False)
        after = os.times()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"127.0.0.1:{port}" in done.stderr
    assert "another process is listening there" in done.stderr
    took_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert took_s < 1.5


@needs_ipv6
def test_dual_stack_server_answers_ipv4_and_ipv6(tiny_path: Path) -> None:
    """A real server with `--host ::`."""
    with ServerProcess("--checkpoint", tiny_path, "--host", "::", ready=False) as running:
        port = running.url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    time.sleep(0.05)
                assert predict(client, encoded(photo())).status_code == 200


def test_a_server_on_a_unix_socket_answers_under_its_own_name(tiny_path: Path, tmp_path: Path) -> None:
    """A socket file that a killed server left is replaced; a second server is refused; the file is gone at the end.

    The server takes the one checkpoint in a folder, and the model's name from an option.
    """
    path = tmp_path / "rednet.sock"
    bind_unix(path).close()  # as after `kill -9`: nothing listens there
    folder = tmp_path / "models"
    shutil.copytree(tiny_path.parent, folder)
    command = [REDNET, "serve", "--uds", path, "--checkpoint", folder, "--model-name", "flowers", "--decoders", "1"]
    running = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            client.timeout = httpx.Timeout(PATIENCE_S)
            wait_until(lambda: listens_at(path), "the socket")  # httpx would leak sockets while it is refused
            wait_until(lambda: is_ready(client), "the server")
            assert predict(client, encoded(photo())).json()["model"] == "flowers"
            assert client.get("/v1/model").json()["name"] == "flowers"
            assert client.get("/v2/models/flowers/ready").status_code == 200
            assert client.get("/v2/models/tiny/ready").status_code == 404
            assert 'name="flowers"' in client.get("/metrics").text
            second = subprocess.run([REDNET, "serve", "--uds", path], capture_output=True, text=True, check=False)
            assert (second.returncode, second.stderr.count("\n")) == (2, 1)
            assert "another process is listening there" in second.stderr
            if curl := shutil.which("curl"):
                asked = [curl, "--silent", "--unix-socket", str(path), "http://localhost/readyz"]
                assert b"ready" in subprocess.run(asked, capture_output=True, check=True).stdout
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 0
    finally:
        running.kill()
        running.wait()
    assert not path.exists()


def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path) -> None:
    """A file stays as it was; a folder that does not exist and a path that is too long are named."""
    (tmp_path / "file").write_text("mine")
    for path, message in (
        (tmp_path / "file", "a file of that name exists"),
        (tmp_path / "no" / "x", "No such file"),
        (tmp_path / ("x" * 120), "too long"),
    ):
        with pytest.raises(OSError, match=f"cannot listen on .*{message}"):
            bind_unix(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_socket_of_another_server_is_not_removed(tmp_path: Path) -> None:
    """One that was started since, under the same name."""
    path = tmp_path / "x.sock"
    with closing(bind_unix(path)):
        inode = path.lstat().st_ino
        remove_unix(path, inode + 1)
        assert path.exists()
        remove_unix(path, inode)
        assert not path.exists()


def test_a_socket_from_the_service_manager_is_used(tiny_path: Path) -> None:
    """By systemd's protocol: descriptor 3, announced in the environment."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        descriptor, port = listening.fileno(), listening.getsockname()[1]
        manager = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
        manager += "LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])"
        options = [str(REDNET), "serve", "--checkpoint", str(tiny_path), "--decoders", "1"]
        command = [sys.executable, "-c", manager, str(descriptor), *options]
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=[descriptor])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            wait_until(lambda: is_ready(client), "the server")
            assert predict(client, encoded(photo())).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 0
    finally:
        running.kill()
        running.wait()


def test_passed_sockets_must_be_for_this_process_and_listen() -> None:
    """Variables for another process are ignored; both ways they are gone for child processes."""
    for process in ("2", "x"):
        environment = {"LISTEN_PID": process, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
        assert passed_sockets(environment) == []
        assert environment == {"HOME": "/"}
    with pytest.raises(OSError, match=r"descriptor \d+ \(LISTEN_FDS\)"):
        passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "100000"})
