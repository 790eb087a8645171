"""Moments between two steps at which all ranks agree on what none of them may do alone."""

import time
from collections.abc import Sequence

from ranks.collectives import largest_numbers
from ranks.process import Process

SECONDS_BETWEEN_MEETINGS = 0.25  # a meeting costs a small message, which is nothing in that time
MOST_STEPS = 1024


class Meetings:
    """Decides after which steps ranks meet: the same ones on all of them.

    A rank alone meets after each step, which costs it nothing. Several ranks meet as often as
    their slowest one makes steps in SECONDS_BETWEEN_MEETINGS.

    Args:
        process: this rank.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._steps_between, self._steps_left = 1, 1
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether ranks meet after the step that has just ended; called once a step."""
        self._steps_left -= 1
        return self._steps_left <= 0

    def begin_other_work(self) -> None:
        """Meet after the next step: how long the ones before took says nothing about it."""
        self._steps_between = self._steps_left = 1

    def hold(self, flags: Sequence[bool]) -> list[bool]:
        """Meet; returns for each flag whether a rank has set it.

        Args:
            flags: as many on each rank.
        """
        if self._process.world_size == 1:
            return list(flags)
        done = self._steps_between - self._steps_left
        seconds_per_step = (time.monotonic() - self._last) / max(done, 1)
        found = largest_numbers(self._process, [*map(float, flags), seconds_per_step])
        steps = int(SECONDS_BETWEEN_MEETINGS / max(found[-1], 1e-9))
        self._steps_between = self._steps_left = min(max(steps, 1), MOST_STEPS)
        self._last = time.monotonic()
        return [number > 0 for number in found[:-1]]
