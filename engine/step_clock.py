"""How fast training is: the steps and rows since the last log line, and their time."""

import time
from typing import NamedTuple


class Pace(NamedTuple):
    """The speed of some steps: milliseconds of a step, and rows a second over all ranks."""

    ms_per_it: float
    rows_per_second: float


class StepClock:
    """Counts steps and rows since it was started."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin anew, now."""
        self._began, self._steps, self._rows = time.perf_counter(), 0, 0

    def note_step(self, num_rows: int) -> None:
        """Count a step on so many rows of all ranks."""
        self._steps += 1
        self._rows += num_rows

    def take(self) -> Pace:
        """The pace of the steps since the start, which is now from here on."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        pace = Pace(1000 * seconds / max(self._steps, 1), self._rows / seconds)
        self.start()
        return pace
