"""The machines of a run tell one another that they are there, before any of them starts ranks.

The scripts in test/ run it: python -m ranks.machines --nnodes=2 --node-rank=0 --master-addr=ADDR
--master-port=PORT. The machine with --node-rank=0 listens at PORT + 1 of ADDR, where its rank 0
will listen later; the others connect to it, and wait until all have come and have the same options.
"""

import contextlib
import json
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from common.errors import UserError, reports_errors
from common.flags import ArgumentParser, number_in
from ranks.addresses import address_of, is_loopback, listen, why_no_address, why_not_here

SECONDS_BEFORE_A_LINE = 5.0
SECONDS_TO_CONNECT = 5.0
_PAUSE = 0.5
_LONGEST_LINE = 1 << 16

Say = Callable[[str], object]


@dataclass(frozen=True)
class Machine:
    """What a machine tells of itself.

    Attributes:
        node_rank: its number, from 0.
        host: its name.
        options: those that have to be the same on all machines, by their names.
    """

    node_rank: int
    host: str
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"the machine with --node_rank={self.node_rank} ({self.host})"


@dataclass(frozen=True)
class Meeting:
    """Where and for how long machines meet.

    Attributes:
        num_machines: how many.
        host: name or address of the one with number 0.
        port: where it listens.
        give_up: until when to wait for the others, by time.monotonic().
        say: prints a line for the user.
    """

    num_machines: int
    host: str
    port: int
    give_up: float
    say: Say

    def receive_all(self, own: Machine, listening: socket.socket) -> str:
        """Wait on machine 0 until all others have come; returns the error for all, or no text.

        A machine that has gone again does not count.

        Raises:
            UserError: some have not come in time.
        """
        guests: dict[socket.socket, Machine] = {}
        with contextlib.ExitStack() as closing:
            waiting = _Waiting(self)
            while True:
                machines = [own, *guests.values()]
                missing = set(range(self.num_machines)) - {one.node_rank for one in machines}
                if (problem := _problem(machines)) or not missing:
                    break
                numbers = ", ".join(f"--node_rank={number}" for number in sorted(missing))
                waiting.wait(f"{numbers} at {self.host}:{self.port}")
                ready, _, _ = select.select([listening, *guests], [], [], _PAUSE)
                for one in set(ready) - {listening}:  # it has no more to say: it has gone
                    del guests[one]
                if listening in ready:
                    guests |= _guest(closing.enter_context(listening.accept()[0]))
            for guest in guests:
                with contextlib.suppress(OSError):
                    guest.sendall(f"{json.dumps(problem)}\n".encode())
        return problem

    def go_to_first(self, own: Machine) -> str:
        """Wait until all machines have come to machine 0; returns the error for all, or no text.

        Raises:
            UserError: machine 0 does not answer in time.
        """
        waiting = _Waiting(self)
        while True:
            try:
                if line := self._answer(own):
                    return str(json.loads(line))
                reason = "it has ended"
            except OSError as error:
                reason = error.strerror or str(error)
            waiting.wait(f"--node_rank=0 at {self.host}:{self.port} ({reason})")
            time.sleep(_PAUSE)

    def _answer(self, own: Machine) -> str:
        with socket.create_connection((self.host, self.port), SECONDS_TO_CONNECT) as first:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # it may be switched off
            first.settimeout(max(self.give_up - time.monotonic(), 1.0))
            first.sendall(f"{json.dumps(asdict(own))}\n".encode())
            return _read_line(first)


class _Waiting:
    """Says after a while for whom a machine waits, and ends the wait when it is too long."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting, self._told = meeting, ""
        self._begin = time.monotonic()

    def wait(self, whom: str) -> None:
        """Note that `whom` has not come yet.

        Raises:
            UserError: it is too late for that.
        """
        now = time.monotonic()
        if now > self._meeting.give_up:
            raise UserError(
                f"no machine with {whom} in {now - self._begin:.0f} s: start the same command"
                " there, and let the machines reach one another at this port and the one before"
            )
        if whom != self._told and now - self._begin > SECONDS_BEFORE_A_LINE:
            self._meeting.say(f"Waiting for the machine with {whom}")
            self._told = whom


def _guest(connection: socket.socket) -> dict[socket.socket, Machine]:
    """The machine that has connected; none if it is somebody else who looks for open ports."""
    connection.settimeout(SECONDS_TO_CONNECT)
    try:
        told = json.loads(_read_line(connection))
        options = {str(name): str(value) for name, value in told["options"].items()}
        return {connection: Machine(int(told["node_rank"]), str(told["host"]), options)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        connection.close()
        return {}


def _read_line(connection: socket.socket) -> str:
    """The next line; empty if the other end has closed the connection."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _LONGEST_LINE:
        piece = connection.recv(4096)
        if not piece:
            return ""
        found += piece
    return found.decode(errors="replace")


def _problem(machines: Sequence[Machine]) -> str:
    """What keeps these machines from working together; empty if nothing does."""
    first, known = machines[0], dict[int, Machine]()
    for machine in machines:
        for name, value in first.options.items():
            got = machine.options.get(name, "")
            if got != value:
                return f"{name}={got} on {machine}, {name}={value} on {first}: give both the same"
        if other := known.get(machine.node_rank):
            both = f"{other.host} and {machine.host}"
            return f"--node_rank={machine.node_rank} on {both}: give each machine its own number"
        known[machine.node_rank] = machine
    return ""


def open_door(host: str, port: int) -> socket.socket:
    """Listen on machine 0, at the port after `port`, which torchrun will take.

    Raises:
        UserError: other machines cannot reach this one so, or a port is taken.
    """
    address = address_of(host)
    if is_loopback(address):
        raise UserError(
            f"--master_addr={host} is {address} here, and no other machine reaches that:"
            " give this machine's name or number in the network"
        )
    for number in (port, port + 1):
        try:
            listening = listen(address, number)
        except OSError as error:
            given = f"--master_addr={host} --master_port={port}"
            raise UserError(
                f"{given}: cannot listen at {address}:{number}: {why_not_here(error)}"
            ) from error
        if number == port:
            listening.close()
    return listening


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m ranks.machines", description="Machines of a run meet.")
    flag = parser.add_argument
    flag("--nnodes", type=number_in(int, 2), required=True, help="number of machines")
    flag("--node-rank", type=number_in(int, 0), required=True, help="this one's number")
    flag("--master-addr", required=True, help="name or address of the one with number 0")
    flag("--master-port", type=number_in(int, 1, 65534), required=True, help="torchrun's port")
    flag("--seconds", type=number_in(int, 1), default=1800, help="how long to wait for the others")
    flag("options", nargs="*", help="NAME=VALUE that has to be the same on all machines")
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Wait until all machines are there; returns the exit status."""
    given = _make_parser().parse_args(argv)
    if reason := why_no_address(given.master_addr):
        raise UserError(
            f"--master_addr={given.master_addr}: {reason}: expected the name or number of the"
            " machine with --node_rank=0"
        )
    options = dict(option.split("=", 1) for option in given.options)
    own = Machine(given.node_rank, socket.gethostname(), options)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    give_up = time.monotonic() + given.seconds
    meeting = Meeting(given.nnodes, given.master_addr, given.master_port + 1, give_up, say)
    if given.node_rank:
        problem = meeting.go_to_first(own)
    else:
        with open_door(given.master_addr, given.master_port) as listening:
            problem = meeting.receive_all(own, listening)
    if problem:
        raise UserError(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
