"""Counts a rank's collectives, so that late ranks can be told from those that wait for them.

All ranks call the same collectives in the same order. The rank that has begun the fewest is the one
that the others wait for.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType


class Attendance:
    """How many collectives this rank has begun, and whether it is inside one; entered for each.

    A collective that goes on while the rank does other work is entered where it begins, and
    `waiting` is entered where the rank waits for it. In between the rank is not inside, however
    many such collectives go on: others that wait may wait for this rank.

    One thread enters and leaves it, another one reads. Both take a fraction of a microsecond.

    Attributes:
        begun: collectives begun.
        is_inside: the rank waits in a collective; it stays inside one that has failed.
        changed: when it went in or came out last, by time.monotonic().
    """

    __slots__ = ("begun", "changed", "is_inside")

    def __init__(self) -> None:
        self.begun, self.is_inside, self.changed = 0, False, time.monotonic()

    def __enter__(self) -> None:
        self._go(True)
        self.begun += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._go(False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a collective that was entered before."""
        self._go(True)
        yield
        self._go(False)  # not after an error

    def _go(self, inside: bool) -> None:
        self.changed = time.monotonic()  # first, or a reader could take time outside for a wait
        self.is_inside = inside


@dataclass(frozen=True)
class Sign:
    """A sign of life of a rank, which differs from all earlier ones of that rank.

    Attributes:
        number: how many it has given before.
        begun: collectives that it has begun.
        is_inside: whether it waits in one.
        seconds: time since it went in or came out last.
    """

    number: int
    begun: int
    is_inside: bool
    seconds: float

    @classmethod
    def of(cls, attendance: Attendance, number: int = 0) -> "Sign":
        """The sign that a rank with this attendance gives now."""
        seconds = time.monotonic() - attendance.changed
        return cls(number, attendance.begun, attendance.is_inside, seconds)

    @classmethod
    def parse(cls, text: str) -> "Sign":
        """The sign whose `str` the text is."""
        number, begun, inside, seconds = text.split()
        return cls(int(number), int(begun), inside == "1", float(seconds))

    def __str__(self) -> str:
        return f"{self.number} {self.begun} {int(self.is_inside)} {self.seconds:.3f}"
