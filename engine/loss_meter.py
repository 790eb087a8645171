"""Losses of training steps, summed between two log lines."""

import math

import torch

from common.errors import UserError
from ranks.collectives import sum_over_ranks
from ranks.process import Process

LOSSES_ON_DEVICE = 1024  # steps whose losses wait on the device before they are read


class LossMeter:
    """Keeps losses on the device until they are printed, so that no step waits for the device."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._losses = torch.zeros(LOSSES_ON_DEVICE, device=process.device)
        self._steps: list[tuple[int, int, int]] = []  # (rows, it, epoch)
        self._sum, self._rows = 0.0, 0

    def add(self, share: torch.Tensor, rows: int, it: int, epoch: int) -> None:
        """Note this rank's share of the mean loss of a step of `rows` rows, over all ranks."""
        self._losses[len(self._steps)] = share
        self._steps.append((rows, it, epoch))
        if len(self._steps) == LOSSES_ON_DEVICE:
            self._read()

    def mean(self) -> float:
        """The mean loss of all rows of all ranks since the last call; waits for the device.

        Raises:
            UserError: a step's loss was not finite; the first one is named.
        """
        self._read()
        mean = self._sum / max(self._rows, 1)
        self._sum, self._rows = 0.0, 0
        return mean

    def _read(self) -> None:
        losses = self._losses[: len(self._steps)]
        sum_over_ranks(self._process, [losses])
        for loss, (rows, it, epoch) in zip(losses.tolist(), self._steps, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at it {it} of epoch {epoch}:"
                    " training stops and saves no model;"
                    " a lower --learning-rate or a warm-up (--lr-num-warmup-steps) may help"
                )
            self._sum += loss * rows
            self._rows += rows
        self._steps = []
