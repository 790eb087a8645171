"""What ranks tell one another besides collectives, in the store where torch lets them meet."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ranks.attendance import Sign

_ENDED = "ZXx"  # states of a process that has ended, but that nobody has waited for


@dataclass(frozen=True)
class Member:
    """The process of a rank.

    Attributes:
        machine: what has process numbers of its own: a machine, or a container on it; empty: it is
            not known.
        host: the machine's name.
        pid: the process's number on that machine.
        started: when it started, in ticks of the machine's clock; numbers are used again.
    """

    machine: str
    host: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> "Member":
        """This process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:  # no Linux, or a container that hides it
            machine = ""
        pid = os.getpid()
        return cls(machine, socket.gethostname(), pid, _started(pid))

    @classmethod
    def parse(cls, text: str) -> "Member":
        """The member whose `str` the text is."""
        machine, host, pid, started = text.split("\n")
        return cls(machine, host, int(pid), started)

    def __str__(self) -> str:
        return "\n".join([self.machine, self.host, str(self.pid), self.started])

    def is_beside(self, other: "Member") -> bool:
        """Whether both are on one machine and can see one another."""
        return bool(self.machine) and self.machine == other.machine

    def has_ended(self) -> bool:
        """Whether the process, which is on this machine, has ended."""
        return _started(self.pid) != self.started


def _started(pid: int) -> str:
    """When a process of this machine started; empty if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the program's name before it may hold anything
    return "" if fields[0] in _ENDED else fields[19]


@dataclass(frozen=True)
class Gone:
    """A rank that has ended before its work was done.

    Attributes:
        rank: its number.
        is_seen: a rank of its machine has seen it; else it gives no signs of life.
    """

    rank: int
    is_seen: bool

    @classmethod
    def parse(cls, text: str) -> "Gone":
        """The one whose `str` the text is."""
        rank, is_seen = text.split()
        return cls(int(rank), is_seen == "True")

    def __str__(self) -> str:
        return f"{self.rank} {self.is_seen}"

    def sentence(self, member: Member, is_elsewhere: bool) -> str:
        """The error of a rank that waits for this one, which is that member."""
        what = "has ended" if self.is_seen else "gives no sign of life"
        where = f" on {member.host}" if is_elsewhere else ""
        return f"rank {self.rank} {what} (process {member.pid}{where}): its own log says why"


class Board:
    """The ranks' members, signs of life and ends, as all of them can read them.

    One thread uses it at a time. Its methods raise RuntimeError if the store cannot be reached.

    Args:
        store: a connection to the store that nobody else uses.
        rank: this rank.
        world_size: number of ranks.
        keeper: the rank whose process keeps the store for all; -1: the launcher does.

    Attributes:
        keeper: as given.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, keeper: int = -1) -> None:
        self._store, self._rank = store, rank
        self._ranks, self.keeper = range(world_size), keeper

    def enter(self) -> None:
        """Tell of this process; every rank does so before any reads."""
        self._store.set(f"member/{self._rank}", str(Member.of_this_process()))
        self.give(Sign(0, 0, False, 0.0))

    def members(self) -> list[Member]:
        """The members, by rank; waits until all have entered."""
        return [Member.parse(text) for text in self._read("member")]

    def give(self, sign: Sign) -> None:
        """Give this rank's sign of life."""
        self._store.set(f"sign/{self._rank}", str(sign))

    def signs(self) -> list[Sign]:
        """The latest sign of each rank."""
        return [Sign.parse(text) for text in self._read("sign")]

    def leave(self) -> None:
        """Tell that this rank has done its work: that it ends then is no accident."""
        self._store.set(f"left/{self._rank}", "")

    def has_left(self, rank: int) -> bool:
        """Whether a rank has done its work."""
        return bool(self._store.check([f"left/{rank}"]))

    def note_gone(self, gone: Gone) -> Gone:
        """Tell that a rank has gone; returns the first one that any rank has told of."""
        return Gone.parse(self._store.compare_set("gone", "", str(gone)).decode())

    def first_gone(self) -> Gone | None:
        """The first rank that any rank has told of; None: none has."""
        told = self._store.check(["gone"])
        return Gone.parse(self._store.get("gone").decode()) if told else None

    def _read(self, what: str) -> Sequence[str]:
        found = self._store.multi_get([f"{what}/{rank}" for rank in self._ranks])
        return [value.decode() for value in found]
