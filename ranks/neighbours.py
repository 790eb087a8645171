"""The other ranks of this machine, whose end a thread sees at once, whatever they wait for."""

import contextlib
import os
import select
from collections.abc import Mapping

from ranks.board import Member


class Neighbours:
    """Watches processes of this machine; one thread waits, others may wake it.

    Args:
        members: the processes, by their ranks.
    """

    def __init__(self, members: Mapping[int, Member]) -> None:
        self._members = dict(members)
        self._our_end, self._their_end = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._our_end, select.POLLIN)
        self._ready: set[int] = set()
        self._files: dict[int, int] = {}  # {rank: a file that can be read when it ends}
        for rank, member in self._members.items():
            with contextlib.suppress(OSError, AttributeError):  # Linux before 5.3 has none
                self._files[rank] = os.pidfd_open(member.pid)
                self._poll.register(self._files[rank], select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until a process ends or `wake` is called."""
        self._ready = {file for file, _ in self._poll.poll(1000 * seconds)}
        if self._our_end in self._ready:
            os.read(self._our_end, 1)

    def wake(self) -> None:
        """End the wait of the thread that waits."""
        os.write(self._their_end, b"x")

    def take_ended(self) -> list[int]:
        """The ranks whose processes have ended since the last call."""
        ended = [
            rank
            for rank, member in self._members.items()
            if self._files.get(rank) in self._ready or member.has_ended()
        ]
        for rank in ended:
            del self._members[rank]
            file = self._files.pop(rank, -1)
            if file >= 0:
                self._poll.unregister(file)
                os.close(file)
        return ended

    def close(self) -> None:
        """Close all files; nobody waits any more."""
        for file in (self._our_end, self._their_end, *self._files.values()):
            os.close(file)
