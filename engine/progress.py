"""How far training is, and how good the model was at its evaluations."""

import math
from dataclasses import dataclass, field

from reporting.metrics import NAN, Metrics


@dataclass
class Progress:
    """How far training is.

    Attributes:
        epoch: number of the current epoch, from 0.
        iter: batches of this epoch that are done.
        num_steps: optimiser steps done, over all epochs.
        resume_iter: batches of the epoch that the last optimiser step included; a resumed run
            begins there.
        train_loss: loss of the last log line.
        best_accuracy, best_auc: the best of all evaluations so far; nan before the first.
        accuracy, auc: those of the last evaluation.
        saved: whether this run has written a model file.
    """

    epoch: int = 0
    iter: int = 0
    num_steps: int = 0
    resume_iter: int = 0
    train_loss: float = NAN
    best_accuracy: float = NAN
    best_auc: float = NAN
    accuracy: float = NAN
    auc: float = NAN
    saved: bool = field(default=False, compare=False)

    def count_update(self, it: int) -> None:
        """Note an optimiser step that includes the epoch's batches up to `it`, from 1."""
        self.num_steps += 1
        self.resume_iter = it

    def note_evaluation(self, metrics: Metrics) -> None:
        """Note the metrics of an evaluation; the best ones so far include it."""
        self.accuracy, self.auc = metrics.accuracy, metrics.auc
        if is_better(metrics.accuracy, self.best_accuracy):
            self.best_accuracy = metrics.accuracy
        if is_better(metrics.auc, self.best_auc):
            self.best_auc = metrics.auc

    def best(self, by_auc: bool) -> float:
        """The best AUC so far, or the best accuracy; nan before the first evaluation."""
        return self.best_auc if by_auc else self.best_accuracy

    def threshold_reached(self, accuracy: float, auc: float) -> str:
        """A sentence about the threshold that the best metrics have reached; empty if none.

        Args:
            accuracy: stop at this accuracy; 0: do not.
            auc: stop at this AUC; 0: do not.
        """
        for name, threshold, best in (
            ("accuracy", accuracy, self.best_accuracy),
            ("auc", auc, self.best_auc),
        ):
            if 0 < threshold <= best:
                return f"{name} {best:.4f} has reached the threshold {threshold}: training stops"
        return ""


def is_better(value: float, best: float) -> bool:
    """Whether a metric is above the best so far; any number is better than nan."""
    return value > best or (math.isnan(best) and not math.isnan(value))
