"""How far training is, and how good the model was at its evaluations."""

import math
from dataclasses import dataclass, field

from reporting.log_lines import best_line, metric_text, saved_line
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
        since_best_accuracy, since_best_auc: evaluations in a row since the one that found the best.
        best_accuracy_epoch, best_accuracy_iter, best_auc_epoch, best_auc_iter: epoch and iter of
            the evaluations that found the best; iter 0: nobody knows, as model files do not tell.
        saved_epoch, saved_iter: epoch and iter of the model file that this run has written last;
            iter 0: it has written none.
        saved: whether this run has written a model file.
        is_seeded: tables began with --initial-values=seeded, in this run or in the one that it
            continues.
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
    since_best_accuracy: int = 0
    since_best_auc: int = 0
    best_accuracy_epoch: int = field(default=0, compare=False)
    best_accuracy_iter: int = field(default=0, compare=False)
    best_auc_epoch: int = field(default=0, compare=False)
    best_auc_iter: int = field(default=0, compare=False)
    saved_epoch: int = field(default=0, compare=False)
    saved_iter: int = field(default=0, compare=False)
    saved: bool = field(default=False, compare=False)
    is_seeded: bool = False

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
        # there is no AUC if all labels are the same: then nothing tells that training should stop
        self.since_best_accuracy += not math.isnan(self.best_accuracy)
        self.since_best_auc += not math.isnan(self.best_auc)
        if is_better(metrics.accuracy, self.best_accuracy):
            self.best_accuracy, self.since_best_accuracy = metrics.accuracy, 0
            self.best_accuracy_epoch, self.best_accuracy_iter = self.epoch, self.iter
        if is_better(metrics.auc, self.best_auc):
            self.best_auc, self.since_best_auc = metrics.auc, 0
            self.best_auc_epoch, self.best_auc_iter = self.epoch, self.iter

    def note_saved(self) -> None:
        """Note that the model as it is now has been written to the model file."""
        self.saved, self.saved_epoch, self.saved_iter = True, self.epoch, self.iter

    def best(self, by_auc: bool) -> float:
        """The best AUC so far, or the best accuracy; nan before the first evaluation."""
        return self.best_auc if by_auc else self.best_accuracy

    def best_step(self, by_auc: bool) -> tuple[int, int]:
        """(epoch, iter) of the evaluation that found the best AUC or accuracy; iter 0: unknown."""
        if by_auc:
            return self.best_auc_epoch, self.best_auc_iter
        return self.best_accuracy_epoch, self.best_accuracy_iter

    def last_line(self, by_auc: bool, path: str) -> str:
        """The last line of a run: what its best model is, and which one it has saved.

        Args:
            by_auc: the best one has the best AUC, else the best accuracy.
            path: the model file; empty: the run saves none.

        Returns:
            The line; empty if the run has neither evaluated nor saved a model.
        """
        best, (epoch, it) = self.best(by_auc), self.best_step(by_auc)
        is_saved = bool(path) and self.saved
        if is_saved and (self.saved_epoch, self.saved_iter) != (epoch, it):
            return saved_line(self.saved_epoch, self.saved_iter, path)
        if math.isnan(best) or not (path or it):
            return ""
        outcome = f"nothing better to save in {path}" if path else "not saved (no --save-model)"
        if is_saved:
            outcome = f"saved in {path}"
        return best_line(metric_text(best, by_auc), epoch, it, outcome)

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

    def patience_over(self, patience: int, by_auc: bool) -> str:
        """A sentence about evaluations that have found nothing better; empty if it is too early.

        Args:
            patience: stop after so many of them in a row; 0: do not.
            by_auc: better is a higher AUC, else a higher accuracy.
        """
        if not 0 < patience <= (self.since_best_auc if by_auc else self.since_best_accuracy):
            return ""
        epoch, it = self.best_step(by_auc)
        where = f"it {it} of epoch {epoch}" if it else "before this run"
        best = metric_text(self.best(by_auc), by_auc).replace(" ", " than ", 1)
        return (
            f"no better {best} ({where}) in the last {patience} evaluations:"
            " training stops (--patience)"
        )


def is_better(value: float, best: float) -> bool:
    """Whether a metric is above the best so far; any number is better than nan."""
    return value > best or (math.isnan(best) and not math.isnan(value))
