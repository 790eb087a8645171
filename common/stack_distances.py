"""A trace's profile, from which synthetic data draws ids."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError

Ints = npt.NDArray[np.int64]
ROUNDING = 1e-6  # of sums of probabilities


class StackDistances:
    """Draws ids by LRU stack distance (a trace's profile), as the original's synthetic data does.

    Args:
        path: three comma-separated lines: ids by first use, stack distances, their cumulative
            probabilities.
        padding: leave new ids out of the draw once all distances can be drawn.

    Raises:
        UserError: the file is missing or its lines are wrong.
    """

    def __init__(self, path: Path, padding: bool) -> None:
        try:
            lines = path.read_text().splitlines()
            self._ids = _whole_numbers(lines[0])
            self._distances = _whole_numbers(lines[1])
            self._probabilities = np.array([float(word) for word in lines[2].split(",")])
        except (OSError, ValueError, IndexError, OverflowError) as error:
            raise UserError(
                f"--data-trace-file: {path}: {error}; expected three comma-separated lines"
                " (ids, stack distances, cumulative probabilities), a file a table"
            ) from error
        distances, steps = self._distances, np.diff([0.0, *self._probabilities, 1.0])
        fits = len(distances) == len(self._probabilities) and distances == sorted(distances)
        fits = fits and bool((steps > -ROUNDING).all())  # false for nan
        if not fits or distances[0] < 0 or distances[-1] > len(self._ids):
            raise UserError(
                f"--data-trace-file: {path}: expected ascending distances from 0 to"
                f" {len(self._ids)} (the number of ids) and as many probabilities, which ascend"
                " from 0 to 1"
            )
        self._padding = padding

    def draw(self, size: int, random: np.random.RandomState) -> Ints:
        """(size,) ids, which may repeat; every call begins with the ids in the file's order."""
        recent = list(self._ids)
        num_new = 0
        drawn = np.empty(size, np.int64)
        for i in range(size):
            distance = self._draw_distance(num_new, float(random.rand(1)[0]))
            num_new += distance == 0
            drawn[i] = recent.pop(0 if distance == 0 else -distance)
            recent.append(int(drawn[i]))
        return drawn

    def _draw_distance(self, num_new: int, number: float) -> int:
        if num_new < self._distances[-1]:
            reachable = int(np.searchsorted(self._distances, num_new, side="right")) - 1
            number *= self._probabilities[max(reachable, 0)]
        elif self._padding:
            number = (1 - self._probabilities[0]) * number + self._probabilities[0]
        index = int(np.searchsorted(self._probabilities, number, side="left"))
        return self._distances[min(index, len(self._distances) - 1)]


def _whole_numbers(line: str) -> list[int]:
    """Comma-separated numbers of at most 64 bits; another one is a ValueError or OverflowError."""
    numbers: list[int] = np.array([int(word) for word in line.split(",")], np.int64).tolist()
    return numbers
