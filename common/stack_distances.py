"""A trace's profile, from which synthetic data draws ids."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.bag_kernels import Profile
from common.errors import UserError

Ints = npt.NDArray[np.int64]
ROUNDING = 1e-6  # of sums of probabilities


class StackDistances:
    """LRU stack distances of a trace, from which the original's synthetic data draws ids.

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
            self._ids, self._distances = _whole_numbers(lines[0]), _whole_numbers(lines[1])
            self._probabilities = np.array([float(word) for word in lines[2].split(",")])
        except (OSError, ValueError, IndexError, OverflowError) as error:
            raise UserError(
                f"--data-trace-file: {path}: {error}; expected three comma-separated lines"
                " (ids, stack distances, cumulative probabilities), a file a table"
            ) from error
        distances, steps = self._distances, np.diff([0.0, *self._probabilities, 1.0])
        fits = len(distances) == len(self._probabilities) and bool(
            (distances[1:] >= distances[:-1]).all()
        )
        fits = fits and bool((steps > -ROUNDING).all())  # false for nan
        if not fits or distances[0] < 0 or distances[-1] > len(self._ids):
            raise UserError(
                f"--data-trace-file: {path}: expected ascending distances from 0 to"
                f" {len(self._ids)} (the number of ids) and as many probabilities, which ascend"
                " from 0 to 1"
            )
        self._ascends, self._padding = bool((steps[:-1] >= 0).all()), padding

    def profile(self, most: int) -> Profile:
        """The record with which compiled loops draw bags of at most `most` ids."""
        recent = np.concatenate([self._ids, np.zeros(most, np.int64)])
        return Profile(
            self._ids, recent, self._distances, self._probabilities, self._ascends, self._padding
        )


def _whole_numbers(line: str) -> Ints:
    """Comma-separated numbers of at most 64 bits; another one is a ValueError or OverflowError."""
    return np.array([int(word) for word in line.split(",")], np.int64)
