"""The sockets that the server listens on. They are bound before anything slow, so that a port in use is reported at
once."""

import errno
import socket
from collections.abc import Sequence


def bind(hosts: str, port: int) -> Sequence[socket.socket]:
    """Bind a TCP socket to each address; the kernel refuses connections until the server listens.

    Args:
        hosts: addresses or names, separated by commas. A name may have several addresses. `::` is IPv4, too, unless
            an IPv4 address is named beside it.
        port: 0: a free one, the same for all of them.

    Raises:
        OSError: an address is in use, or not this machine's. The message names it.
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


def url(bound: socket.socket) -> str:
    """The address of a bound socket, as clients write it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resolve(host: str) -> Sequence[tuple[socket.AddressFamily, str]]:
    """The addresses of a name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not the name of a host"
        raise OSError(f"--host {host}: {reason}") from None
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    return [each for each in addresses if len(addresses) == 1 or _is_here(*each)] or addresses


def _is_here(family: socket.AddressFamily, host: str) -> bool:
    """Whether this machine has an address: "localhost" is ::1, too, where IPv6 is switched off."""
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
    except OSError as error:  # no IPv6 here
        raise OSError(f"cannot listen on {shown}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot listen on {shown}: {reason}") from None
    return bound
