"""The machines of a run meet, prepare their data, and start their ranks together, or none does.

The scripts in test/ run it: python -m ranks.machines --nnodes=2 --node-rank=0 --master-addr=ADDR
--master-port=PORT -- COMMAND. The machine with --node-rank=0 listens at PORT + 1 of ADDR, where its
rank 0 will listen later; the others connect to it. Once all have come and have the same options,
each runs the command. All end with status 0 if it has ended well on all. The connections stay open
until then, so that all know at once when a machine has ended.
"""

import argparse
import errno
import os
import socket
import sys
import time
from collections.abc import Sequence

from common.errors import UserError, reports_errors
from common.flags import ArgumentParser, number_in
from common.termination import ends_on_signals
from ranks.addresses import address_of, is_reachable, listen, why_no_address, why_not_here
from ranks.gathering import First, Guest, Meeting, Work
from ranks.machine_connection import Machine


def address_of_first(host: str) -> str:
    """The address of machine 0.

    Raises:
        UserError: it has none, or other machines cannot reach it there.
    """
    if reason := why_no_address(host):
        raise UserError(
            f"--master_addr={host}: {reason}: expected the name or number of the machine with"
            " --node_rank=0"
        )
    address = address_of(host)
    if not is_reachable(address):
        raise UserError(
            f"--master_addr={host} is {address} here, and no other machine reaches that: give the"
            " name or number in the network of the machine with --node_rank=0"
        )
    return address


def open_door(host: str, address: str, port: int) -> socket.socket:
    """Listen on machine 0, at the port after `port`, which torchrun will take.

    Args:
        host: its name, for a message.
        address: where it listens.
        port: torchrun's.

    Raises:
        UserError: the address is another machine's, or a port is taken.
    """
    for number in (port, port + 1):
        try:
            listening = listen(address, number)
        except OSError as error:
            remedy = "give all machines another --master_port"
            if error.errno == errno.EADDRNOTAVAIL:
                remedy = "--node_rank=0 is for the machine that --master_addr names"
            raise UserError(
                f"--master_addr={host} --master_port={port}: cannot listen at {address}:{number}:"
                f" {why_not_here(error)}: {remedy}"
            ) from error
        if number == port:
            listening.close()
    return listening


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ranks.machines",
        description="Machines of a run meet; each runs the command that stands after --.",
    )
    flag = parser.add_argument
    flag("--nnodes", type=number_in(int, 2), required=True, help="number of machines")
    flag("--node-rank", type=number_in(int, 0), required=True, help="this one's number")
    flag("--master-addr", required=True, help="name or address of the one with number 0")
    flag("--master-port", type=number_in(int, 1, 65534), required=True, help="torchrun's port")
    flag("--seconds", type=number_in(int, 1), default=1800, help="how long to wait for the others")
    flag("--parent", type=int, default=os.getppid(), help="end if this is no longer the parent")
    flag("--folder", default=".", help="where the command runs")
    flag("--same", type=_named, action="append", default=[], metavar="NAME=VALUE",
         help="an option that has to be the same on all machines")  # fmt: skip
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Meet, run the command, and wait until it has ended well everywhere; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    given, command = _make_parser().parse_args(words[:end]), words[end + 1 :]
    if given.node_rank >= given.nnodes:
        last = given.nnodes - 1
        raise UserError(f"--node_rank={given.node_rank}: expected a number from 0 to {last}")
    options = {"--nnodes": str(given.nnodes), **dict(given.same)}
    own = Machine(given.node_rank, socket.gethostname(), options)
    address = address_of_first(given.master_addr)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    give_up, port = time.monotonic() + given.seconds, given.master_port + 1
    meeting = Meeting(given.nnodes, given.master_addr, port, give_up, say, given.parent)
    with ends_on_signals(lambda error: None), Work(command, given.folder) as work:
        if given.node_rank:
            return Guest(meeting, own, work).run()
        listening = open_door(given.master_addr, address, given.master_port)
        return First(meeting, own, work, listening).run()


if __name__ == "__main__":
    sys.exit(main())
