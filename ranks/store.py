"""Where the ranks of a run meet: the launcher's store or rank 0's, and the network they use."""

import contextlib
import errno
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.environment import is_whole_number
from common.errors import PassingError, RankError
from common.torchrun import RESTARTS, launcher_keeps_store
from ranks.addresses import (
    LOOPBACK,
    address_of,
    interface_of,
    is_reachable,
    listen,
    own_address,
    why_no_address,
    why_not_here,
)

SECONDS_FOR_ADDRESS = 15.0  # a cluster may come to know rank 0's name a little later
# A rank 0 that was killed leaves loaders, which have its port for five seconds.
SECONDS_FOR_PORT = 15.0
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_PAUSE = 0.2


def check_meeting_point(address: str, port: str) -> None:
    """Raise a RankError if no such port or machine exists; torch would try for half an hour."""
    if not is_whole_number(port, 65535, 5):
        raise RankError(f"MASTER_PORT={port!r} in the environment: expected a port, 1 to 65535")
    give_up = time.monotonic() + SECONDS_FOR_ADDRESS
    while reason := why_no_address(address):
        if time.monotonic() > give_up:
            raise RankError(
                f"MASTER_ADDR={address!r} in the environment: {reason}:"
                " expected the name or number of rank 0's machine"
            )
        time.sleep(min(1.0, SECONDS_FOR_ADDRESS))


def connect_twice(rank: int, world_size: int, timeout: float) -> tuple[dist.Store, dist.Store]:
    """Two new connections to the store where the ranks meet.

    If the launcher does not keep the store, rank 0 does, while it holds the first connection.
    torch's own server listens at all addresses of a machine, whatever address it is given. This one
    listens at MASTER_ADDR's alone, or at the loopback address if all ranks are on this machine.

    Args:
        rank: this rank.
        world_size: number of ranks.
        timeout: seconds that a request may take.

    Raises:
        RankError: other machines cannot reach this one at MASTER_ADDR.
        PassingError: rank 0 cannot listen there.
        RuntimeError: torch's error; the ranks have not met.
    """
    wait = timedelta(seconds=timeout)
    if launcher_keeps_store():
        return _launchers(rank, world_size, wait), _launchers(rank, world_size, wait)
    host, port = _meeting_host(world_size), int(os.environ["MASTER_PORT"])

    def connected() -> dist.Store:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=wait)

    if rank:
        return connected(), connected()
    server = keep_store(_listening(host, port, world_size), host, world_size, wait)
    return server, connected()


def keep_store(
    listening: socket.socket, host: str, world_size: int | None, timeout: timedelta
) -> dist.TCPStore:
    """A store behind a listening socket, which it takes over.

    Args:
        listening: it listens at an address of `host`.
        host: the name by which this process connects to it.
        world_size: number of ranks to wait for; None: it waits for nobody.
        timeout: of a request.
    """
    port = listening.getsockname()[1]
    # torch 2.6's libuv cannot take a socket
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout,
        wait_for_workers=world_size is not None, master_listen_fd=listening.detach(),
        use_libuv=False,
    )  # fmt: skip


def _launchers(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A connection to the launcher's store.

    torchrun keeps its store when it starts all ranks again, and ranks that met at the addresses of
    those before would wait for ever (torch 2.13 relies on a new store). So each attempt has names
    of its own.
    """
    store, _, _ = next(rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))
    return dist.PrefixStore(f"attempt/{os.environ.get(RESTARTS, '0')}", store)


def _meeting_host(world_size: int) -> str:
    """The machine with rank 0, by the name or address at which this rank reaches it."""
    return LOOPBACK if _are_all_here(world_size) else os.environ["MASTER_ADDR"]


def _are_all_here(world_size: int) -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)


def _are_elsewhere_too(world_size: int) -> bool:
    """Whether some ranks are known to be on other machines; not all launchers tell."""
    return "LOCAL_WORLD_SIZE" in os.environ and not _are_all_here(world_size)


def _listening(host: str, port: int, world_size: int) -> socket.socket:
    address = address_of(host)
    if not is_reachable(address) and _are_elsewhere_too(world_size):
        raise RankError(
            f"MASTER_ADDR={host} is {address} on rank 0's machine, and no other machine reaches"
            " that: give its name or number in the network"
        )
    give_up = time.monotonic() + (SECONDS_FOR_PORT if os.environ.get(RESTARTS, "0") != "0" else 0)
    while True:
        try:
            return listen(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= give_up:
                raise PassingError(
                    f"the ranks cannot meet at {meeting_point()}: {why_not_here(error)}"
                ) from error
        time.sleep(_PAUSE)


def meeting_point() -> str:
    """MASTER_ADDR and MASTER_PORT, for a message."""
    names = ("MASTER_ADDR", "MASTER_PORT")
    return ", ".join(f"{name}={os.environ.get(name)}" for name in names)


def choose_interface(world_size: int) -> None:
    """Have gloo use the network in which the ranks have met, unless GLOO_SOCKET_IFNAME says which.

    By itself gloo takes the address that this machine's own name has, which may be any.

    Raises:
        RankError: that is a network of this machine alone, but some ranks are elsewhere.
    """
    if os.environ.get(GLOO_INTERFACE):
        return
    host = _meeting_host(world_size)
    with contextlib.suppress(OSError):  # gloo chooses, then
        address = own_address(address_of(host))
        if not is_reachable(address) and _are_elsewhere_too(world_size):
            raise RankError(
                f"MASTER_ADDR={host} is {address} on this machine, and no other machine reaches"
                f" that: set {GLOO_INTERFACE} to the network interface that they reach"
            )
        if name := interface_of(address):
            os.environ[GLOO_INTERFACE] = name
