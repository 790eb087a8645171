"""How far training is."""

from dataclasses import dataclass, field

NAN = float("nan")


@dataclass
class Progress:
    """How far training is.

    Attributes:
        epoch: the epoch at work.
        iter: batches of it that are done.
        num_steps: optimiser steps done, over all epochs.
        resume_iter: batches of the epoch that the last optimiser step included; a resumed run
            begins there.
        train_loss: loss of the last log line.
        best_accuracy, best_auc: of the evaluations so far; nan before the first.
        accuracy, auc: of the last evaluation.
        saved: a model file was written by this run.
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
