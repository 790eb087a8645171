"""Losses of training steps, summed between two log lines."""

import math
from collections.abc import Mapping

import torch

from common.errors import UserError
from ranks.collectives import sum_in_rank_order
from ranks.process import Process

MOST_ROWS = 2**53  # counted between two log lines: a float holds each number up to it
LOSSES_ON_DEVICE = 1024  # steps whose losses wait on the device before they are read
_COUNTS = ("rows", "skipped", "first_it", "first_epoch")  # whole numbers of a meter's state


class LossMeter:
    """Keeps losses on the device until they are printed, so that no step waits for the device.

    Args:
        process: this rank.
        skips: batches whose loss is not finite were skipped (--on-nan=skip); else one is an error.
    """

    def __init__(self, process: Process, skips: bool = False) -> None:
        self._process, self._skips = process, skips
        self._losses = torch.zeros(LOSSES_ON_DEVICE, device=process.device)
        self._steps: list[tuple[int, int, int]] = []  # (rows, it, epoch)
        self._sum, self._rows = 0.0, 0
        self._num_skipped, self._first = 0, (0, 0)  # (it, epoch) of the first batch skipped

    def add(self, share: torch.Tensor, rows: int, it: int, epoch: int) -> None:
        """Note this rank's share of the mean loss of a step of `rows` rows, over all ranks."""
        self._losses[len(self._steps)] = share
        self._steps.append((rows, it, epoch))
        if len(self._steps) == LOSSES_ON_DEVICE:
            self._read()

    def mean(self) -> float:
        """The mean loss of all rows of all ranks since the last call; waits for the device.

        Rows of batches that were skipped do not count; nan: there are no others.

        Raises:
            UserError: a step's loss was not finite; the first one is named.
        """
        self._read()
        mean = self._sum / self._rows if self._rows else math.nan
        self._sum, self._rows = 0.0, 0
        return mean

    def take_warning(self) -> str:
        """A line about batches that were skipped, each of which it tells of once; empty: none was.

        It knows of those that `mean` has seen.
        """
        num_skipped, (it, epoch) = self._num_skipped, self._first
        self._num_skipped, self._first = 0, (0, 0)
        if not num_skipped:
            return ""
        return (
            f"warning: the loss of {num_skipped} batch(es) was not finite, the first at it {it} of"
            f" epoch {epoch}: skipped (--on-nan=skip)"
        )

    def state(self) -> dict[str, float | int]:
        """What `mean` and `take_warning` will tell of the steps so far; waits for the device.

        All ranks call it, and all get the same numbers.

        Raises:
            UserError: a step's loss was not finite, as in `mean`.
        """
        self._read()
        it, epoch = self._first
        counts = zip(_COUNTS, (self._rows, self._num_skipped, it, epoch), strict=True)
        return {"sum": self._sum, **dict(counts)}

    def restore(self, state: Mapping[str, float | int]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: a number is missing, or cannot be.
        """
        total, counts = state.get("sum"), [state.get(name) for name in _COUNTS]
        if type(total) is not float or not math.isfinite(total):
            raise ValueError(f"the sum of losses is {total!r}, expected a finite float")
        for name, count in zip(_COUNTS, counts, strict=True):
            if type(count) is not int or not 0 <= count <= MOST_ROWS:
                raise ValueError(f"{name} is {count!r}, expected a whole number from 0 on")
        self._sum, self._rows = total, int(state["rows"])
        self._num_skipped = int(state["skipped"])
        self._first = int(state["first_it"]), int(state["first_epoch"])

    def _read(self) -> None:
        losses = sum_in_rank_order(self._process, self._losses[: len(self._steps)])
        for loss, (rows, it, epoch) in zip(losses.tolist(), self._steps, strict=True):
            if math.isfinite(loss):
                self._sum += loss * rows
                self._rows += rows
            elif self._skips:
                self._first = self._first if self._num_skipped else (it, epoch)
                self._num_skipped += 1
            else:
                raise UserError(
                    f"the loss became {loss} at it {it} of epoch {epoch}:"
                    " training stops and saves no model;"
                    " a lower --learning-rate or a warm-up (--lr-num-warmup-steps) may help"
                )
        self._steps = []
