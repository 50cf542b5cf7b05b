"""Where the server listens: IPv4, IPv6, both, and addresses that it cannot have."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from rednet.service.system.sockets import bind, url
from tests.conftest import encoded, photo
from tests.http_helpers import predict
from tests.servers import REDNET, ServerProcess


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def answers_at(bound: Sequence[socket.socket], stack: ExitStack) -> list[str]:
    """Of 127.0.0.1, 127.0.0.2 and ::1, those where something listens."""
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
    """One address, several, all of IPv4, or everything: `::` is IPv4, too, unless IPv4 is named beside it."""
    with ExitStack() as stack:
        assert answers_at(bind(hosts, 0), stack) == expected


def test_a_name_is_served_on_those_of_its_addresses_that_exist() -> None:
    """localhost is ::1, too, except where IPv6 is off."""
    with ExitStack() as stack:
        assert "127.0.0.1" in answers_at(bind("localhost", 0), stack)


@pytest.mark.parametrize("hosts", ["no.such.host.invalid", "192.0.2.1", "127.0.0.1,192.0.2.1", "1.2.3.4.5", "a b"])
def test_an_address_of_another_machine_is_refused(hosts: str) -> None:
    """The message names it; 192.0.2.0/24 belongs to documentation."""
    with pytest.raises(OSError, match=hosts.rpartition(",")[2]):
        bind(hosts, 0)


def test_urls_have_brackets_around_ipv6() -> None:
    """As clients write them."""
    with closing(bind("127.0.0.1", 0)[0]) as bound:
        assert url(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    if has_ipv6():
        with closing(bind("::1", 0)[0]) as bound:
            assert url(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def test_a_port_in_use_is_reported_before_pytorch_is_imported(tiny_path: Path) -> None:
    """Status 2 and one line that names the address; importing and preparing would take several times as long."""
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
    assert "another process listens there" in done.stderr
    took_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert took_s < 1.5


@needs_ipv6
def test_a_dual_stack_server_answers_both_families(tiny_path: Path) -> None:
    """A real server with `--host ::`."""
    with ServerProcess("--checkpoint", tiny_path, "--host", "::", ready=False) as running:
        port = running.url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    time.sleep(0.05)
                assert predict(client, encoded(photo())).status_code == 200
