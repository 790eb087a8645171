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
        resume_iter: batches of the epoch up to the last one after which an optimiser step was
            due; a resumed run begins there.
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

    def note_batch(self, epoch: int, it: int) -> None:
        """Note that batch `it` of an epoch, from 1, is done."""
        self.epoch, self.iter = epoch, it
        if self.resume_iter > it:  # it is the last epoch's: no step was due in this one yet
            self.resume_iter = 0

    def note_due(self, it: int, has_updated: bool) -> None:
        """Note that an optimiser step was due after batch `it` of the epoch, from 1.

        Args:
            it: the step's last batch.
            has_updated: whether there was anything to update with: batches may be skipped.
        """
        self.num_steps += has_updated
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
