"""Binds the server's sockets. This happens before anything slow, so that a port in use is reported at once."""

import errno
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

FIRST_PASSED = 3  # the first descriptor that a service manager passes


def bind(hosts: str, port: int) -> Sequence[socket.socket]:
    """Bind a TCP socket to each address. The kernel refuses connections until the server listens.

    Args:
        hosts: addresses or names, separated by commas. A name may have several addresses. `::` includes IPv4, unless
            an IPv4 address is listed as well.
        port: the same for all addresses; 0: any free port.

    Raises:
        OSError: an address is in use, or does not belong to this machine. The message names it.
    """
    addresses = [address for host in hosts.split(",") for address in _resolve(host.strip())]
    families = {family for family, _ in addresses}
    sockets: list[socket.socket] = []
    try:
        for family, host in dict.fromkeys(addresses):
            v6_only = host != "::" or socket.AF_INET in families
            sockets.append(_bind(family, host, port or (sockets[0].getsockname()[1] if sockets else 0), v6_only))
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def bind_unix(path: Path) -> socket.socket:
    """Bind a Unix socket, in place of one that a server left behind. Its permissions follow from the umask.

    It listens at once: clients wait until the server is there, and another server can tell that this one is starting.

    Raises:
        OSError: another process is listening there, the path is not a socket, or it cannot be used.
    """
    is_socket = False
    with suppress(OSError):  # binding reports what is wrong with the path
        if is_socket := stat.S_ISSOCK(path.lstat().st_mode):
            _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(str(path))
        bound.listen(socket.SOMAXCONN)
    except OSError as error:
        bound.close()
        reason = error.strerror or error  # a path that is too long has no number
        if error.errno == errno.EADDRINUSE:
            reason = "another process is listening there" if is_socket else "a file of that name exists"
        raise OSError(f"cannot listen on {path}: {reason}") from None
    return bound


def remove_unix(path: Path, inode: int) -> None:
    """Remove the file of a Unix socket, unless it has become another one: of a server that was started since."""
    with suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def passed_sockets(environment: MutableMapping[str, str]) -> Sequence[socket.socket]:
    """The listening sockets that a service manager passed (socket activation); usually none.

    The variables are removed from the environment, so that child processes do not take them for theirs.

    Raises:
        OSError: a descriptor is not a stream socket.
    """
    process, count = environment.pop("LISTEN_PID", None), environment.pop("LISTEN_FDS", "0")
    environment.pop("LISTEN_FDNAMES", None)
    # In a container the variable names PID 1, from which this process has been forked.
    if process not in (str(os.getpid()), "1") or not count.isdecimal():
        return []
    sockets = []
    for descriptor in range(FIRST_PASSED, FIRST_PASSED + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            passed = socket.socket(fileno=descriptor)
        except OSError as error:
            raise OSError(f"descriptor {descriptor} (LISTEN_FDS) cannot be used: {error.strerror}") from None
        if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(f"descriptor {descriptor} (LISTEN_FDS) is not a stream socket that listens")
        sockets.append(passed)
    return sockets


def url(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def grpc_addresses(sockets: Sequence[socket.socket]) -> Sequence[str]:
    """The addresses of bound sockets, as gRPC takes them. At `[::]` it listens for IPv4, too."""
    addresses = [url(each).removeprefix("http://") for each in sockets]
    return [each for each in addresses if each.startswith("[::]")] or addresses


def _remove_stale(path: Path) -> None:
    """Remove a socket's file that no process listens on any more."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full queue of connections is a process, too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _resolve(host: str) -> Sequence[tuple[socket.AddressFamily, str]]:
    """The addresses of a name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid host name"
        raise OSError(f"--host {host}: {reason}") from None
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    return [each for each in addresses if len(addresses) == 1 or _is_here(*each)] or addresses


def _is_here(family: socket.AddressFamily, host: str) -> bool:
    """Whether this machine has an address. "localhost" resolves to ::1 even if IPv6 is disabled."""
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _bind(family: socket.AddressFamily, host: str, port: int, v6_only: bool) -> socket.socket:
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = socket.socket(family)
    except OSError as error:  # IPv6 is not available
        raise OSError(f"cannot listen on {shown}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = "another process is listening there" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot listen on {shown}: {reason}") from None
    return bound
