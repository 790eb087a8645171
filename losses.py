"""Losses of the model, and their sums between two log lines."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import extend_distributed as ext_dist
from command_line import UserError

LOSSES_ON_DEVICE = 1024  # steps whose losses wait on the device before they are read

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(kind: str, weights: Sequence[float], device: torch.device) -> Loss:
    """The loss, summed over rows: (predictions (B, 1), labels (B, 1)) -> scalar.

    Args:
        kind: mse, bce (binary cross entropy) or wbce, where each label has a weight.
        weights: wbce: of label 0, of label 1; labels are cut to integers.
        device: where predictions are.
    """
    if kind == "mse":
        return lambda predicted, label: F.mse_loss(predicted, label, reduction="sum")
    if kind == "bce":
        return _cross_entropy
    of_label = torch.tensor(weights, dtype=torch.float32, device=device)[:, None]

    def weighted(predicted: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        weight = F.embedding(label.long().squeeze(1), of_label)
        return _cross_entropy(predicted, label, weight)

    return weighted


def _cross_entropy(
    predicted: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """binary_cross_entropy, summed, that gives nan for nan: torch's own stops the process there.

    On a GPU that is an assertion in a kernel, after which the device is lost.
    """
    is_nan = predicted.isnan()
    safe = torch.where(is_nan, 0.5, predicted)
    entropy = F.binary_cross_entropy(safe, label, weight=weight, reduction="sum")
    return entropy + torch.where(is_nan, predicted, 0.0).sum()


class LossMeter:
    """Losses of steps, kept on the device until printed, so that a step does not wait for it."""

    def __init__(self, process: ext_dist.Process) -> None:
        self._process = process
        self._losses = torch.zeros(LOSSES_ON_DEVICE, device=process.device)
        self._steps: list[tuple[int, int, int]] = []  # (rows, it, epoch)
        self._sum, self._rows = 0.0, 0

    def add(self, share: torch.Tensor, rows: int, it: int, epoch: int) -> None:
        """This rank's share of the mean loss of a step of `rows` rows."""
        self._losses[len(self._steps)] = share
        self._steps.append((rows, it, epoch))
        if len(self._steps) == LOSSES_ON_DEVICE:
            self._read()

    def mean(self) -> float:
        """The mean over all rows since the last call, of all ranks.

        Raises:
            UserError: a step's loss was not finite; the first one is named.
        """
        self._read()
        mean = self._sum / max(self._rows, 1)
        self._sum, self._rows = 0.0, 0
        return mean

    def _read(self) -> None:
        losses = self._losses[: len(self._steps)]
        ext_dist.sum_over_ranks(self._process, [losses])
        for loss, (rows, it, epoch) in zip(losses.tolist(), self._steps, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at it {it} of epoch {epoch}:"
                    " training stops and saves no model;"
                    " a lower --learning-rate or a warm-up (--lr-num-warmup-steps) may help",
                    everywhere=True,
                )
            self._sum += loss * rows
            self._rows += rows
        self._steps = []
