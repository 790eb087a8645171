"""Which ranks others wait for, by the ranks' signs of life, and the sentences that say it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ranks.attendance import Sign

_ONE = {
    "ranks": "rank", "are": "is", "hang": "hangs", "they": "it", "them": "it", "have": "has",
    "do": "does", "their": "its",
}  # fmt: skip
_SEVERAL = {word: word for word in _ONE}


@dataclass(frozen=True)
class Late:
    """Ranks that others wait for.

    Attributes:
        ranks: their numbers; none: none is known to be late.
        waiting: the ranks that wait for them.
        answer: whether the late ranks give signs of life.
        seconds: time since the late ranks have left their last collective, if they answer. One that
            goes on is left, too: its numbers come although the rank does not wait for it.
        hosts: the machines of those of them that are not on the machine that says so.
    """

    ranks: Sequence[int]
    waiting: Sequence[int]
    answer: bool = True
    seconds: float = 0.0
    hosts: Sequence[str] = ()

    def slow_sentence(self, waited: float) -> str:
        """The line for a log when others have waited for so many seconds."""
        return self._say("{ranks} {are} slow: for {waited} s {why}", f"{waited:.0f}")

    def no_longer_sentence(self, waited: float) -> str:
        """The line for a log when the wait has ended after so many seconds."""
        return self._say("{ranks} {are} no longer waited for, after {waited} s", f"{waited:.0f}")

    def hang_sentence(self, timeout: float) -> str:
        """The error when others have waited for the group's timeout, in seconds."""
        waited = f"{timeout:g} s (--dist-timeout)"
        if not self.ranks:
            return f"a collective has not ended in {waited}: it is not known which rank hangs"
        return self._say("{ranks} {hang}: for {waited} {why}", waited)

    def _say(self, form: str, waited: str) -> str:
        words = _ONE if len(self.ranks) == 1 else _SEVERAL
        numbers = ", ".join(str(rank) for rank in self.ranks)
        where = f" (on {', '.join(self.hosts)})" if self.hosts else ""
        why = "the others have waited for {them} at a collective"
        if self.answer:
            why += " that {they} {have} not begun ({they} left {their} last one {ago:.0f} s ago)"
        else:
            why += ", and {they} {do} not answer"
        given = words | {"ranks": f"{words['ranks']} {numbers}{where}", "waited": waited}
        return form.format(**given, why=why.format(**given, ago=self.seconds))


class Hearing:
    """The signs of all ranks as one of them reads them, and when each was last a new one."""

    def __init__(self) -> None:
        self._heard: list[tuple[Sign, float]] = []

    def hear(self, signs: Sequence[Sign]) -> None:
        """Note the latest sign of each rank."""
        now = time.monotonic()
        before = self._heard or [(sign, now) for sign in signs]
        self._heard = [
            (sign, when if sign == old else now)
            for sign, (old, when) in zip(signs, before, strict=True)
        ]

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have given no new sign for so many seconds."""
        end = time.monotonic() - seconds
        return [rank for rank, (_, when) in enumerate(self._heard) if when < end]

    def late(self, seconds: float, runs_ahead: bool) -> Late:
        """Which ranks are late.

        Args:
            seconds: a rank that has given no new sign for so long does not answer.
            runs_ahead: a collective ends on the host before it has ended on the device: a rank
                outside of a collective may wait for another rank, too.
        """
        signs = {rank: sign for rank, (sign, _) in enumerate(self._heard)}
        silent = self.silent(seconds)
        least = min((signs[rank].begun for rank in silent or signs), default=0)
        waiting = [
            rank
            for rank, sign in signs.items()
            if rank not in silent
            and (sign.is_inside or runs_ahead)
            and (sign.begun > least or (silent and sign.is_inside))
        ]
        if silent or not waiting:
            return Late(silent if waiting else (), waiting, answer=False)
        behind = [r for r, sign in signs.items() if sign.begun == least and not sign.is_inside]
        ago = min((signs[rank].seconds for rank in behind), default=0.0)
        return Late(behind, waiting, seconds=ago)
