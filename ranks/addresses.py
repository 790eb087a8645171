"""Addresses of machines: which one a name has, which one is this machine's, and what listens."""

import errno
import fcntl
import ipaddress
import socket
import struct
from array import array
from pathlib import Path

LOOPBACK = "127.0.0.1"
_SIOCGIFCONF = 0x8912  # Linux: asks for all IPv4 addresses of all interfaces
_ENTRY = struct.Struct("16s4x4s16x")  # of its answer: a name, a family and a port, an address
_MOST_ADDRESSES = 1024


def why_no_address(name: str) -> str:
    """Why the system finds no address for a machine's name; empty if it finds one."""
    try:
        address_of(name)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or "this is no name"
    return ""


def address_of(name: str) -> str:
    """The address of a machine: of IPv4 if it has one, as whoever connects tries both kinds.

    Raises:
        OSError: the name has none.
        UnicodeError: it is no name.
    """
    found = socket.getaddrinfo(name or "(empty)", None, type=socket.SOCK_STREAM)
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    return str(found[0][4][0])


def is_reachable(address: str) -> bool:
    """Whether an address may lead to a machine from another one: loopback or 0.0.0.0 does not."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_unspecified or parsed.is_multicast)


def own_address(other: str) -> str:
    """This machine's address that a machine at `other` sees; nothing is sent.

    Raises:
        OSError: no way leads there.
    """
    with socket.socket(_family(other), socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # UDP: the system chooses the way, and the port does not matter
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has this address of this machine; empty if none is known to have it."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        return _interface_of_ipv6(wanted.packed.hex())
    if wanted.is_loopback:  # all of 127.0.0.0/8
        wanted = ipaddress.ip_address(LOOPBACK)
    return next((name for name, packed in _ipv4_addresses() if packed == wanted.packed), "")


def _ipv4_addresses() -> list[tuple[str, bytes]]:
    """(interface, address) of all IPv4 addresses of this machine; an interface may have several."""
    room = array("B", bytes(_ENTRY.size * _MOST_ADDRESSES))
    request = struct.pack("iP", len(room), room.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFCONF, request)
        except OSError:
            return []
    num_bytes, _ = struct.unpack("iP", answer)
    entries = _ENTRY.iter_unpack(room.tobytes()[:num_bytes])
    return [(name.partition(b"\0")[0].decode(), packed) for name, packed in entries]


def _interface_of_ipv6(digits: str) -> str:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[-1] for line in lines if line.split()[0] == digits), "")


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at one address of this machine, and at no other.

    Raises:
        OSError: the port is taken, or the address is another machine's; `why_not_here` tells.
    """
    listening = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(socket.SOMAXCONN)
    except OSError:
        listening.close()
        raise
    return listening


def why_not_here(error: OSError) -> str:
    """Why nothing can listen, in a few words."""
    known = {
        errno.EADDRINUSE: "the port is taken",
        errno.EADDRNOTAVAIL: "this machine does not have that address",
        errno.EACCES: "the port is the system's, below 1024",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
