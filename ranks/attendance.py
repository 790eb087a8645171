"""Counts a rank's collectives, so that late ranks can be told from those that wait for them.

All ranks call the same collectives in the same order. The rank that has begun the fewest is the one
that the others wait for.
"""

import time
from dataclasses import dataclass
from types import TracebackType


class Attendance:
    """How many collectives this rank has begun and ended; entered and left for each of them.

    One that goes on while the rank does other work has begun and not ended: `begin` and `end`.

    One thread enters and leaves it, another one reads. Both take a fraction of a microsecond.

    Attributes:
        begun: collectives begun.
        ended: collectives ended; one that fails never ends.
        changed: when the latest one began or ended, by time.monotonic().
    """

    __slots__ = ("begun", "changed", "ended")

    def __init__(self) -> None:
        self.begun, self.ended, self.changed = 0, 0, time.monotonic()

    def begin(self) -> None:
        """Note that a collective begins."""
        self.changed = time.monotonic()
        self.begun += 1

    def end(self) -> None:
        """Note that a collective has ended."""
        self.changed = time.monotonic()
        self.ended += 1

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end()

    @property
    def is_inside(self) -> bool:
        """Whether the rank is inside a collective."""
        return self.begun > self.ended


@dataclass(frozen=True)
class Sign:
    """A sign of life of a rank, which differs from all earlier ones of that rank.

    Attributes:
        number: how many it has given before.
        begun: collectives that it has begun.
        ended: collectives that it has ended.
        seconds: time since the latest one began or ended.
    """

    number: int
    begun: int
    ended: int
    seconds: float

    @classmethod
    def of(cls, attendance: Attendance, number: int = 0) -> "Sign":
        """The sign that a rank with this attendance gives now."""
        seconds = time.monotonic() - attendance.changed
        return cls(number, attendance.begun, attendance.ended, seconds)

    @classmethod
    def parse(cls, text: str) -> "Sign":
        """The sign whose `str` the text is."""
        number, begun, ended, seconds = text.split()
        return cls(int(number), int(begun), int(ended), float(seconds))

    def __str__(self) -> str:
        return f"{self.number} {self.begun} {self.ended} {self.seconds:.3f}"

    @property
    def is_inside(self) -> bool:
        """Whether the rank is inside a collective."""
        return self.begun > self.ended
