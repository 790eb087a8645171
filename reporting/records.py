"""What a run tells its reporter: the facts of a log line and of an evaluation."""

from dataclasses import dataclass

from reporting.log_lines import StepPosition
from reporting.metrics import Metrics


@dataclass(frozen=True)
class TrainingRecord:
    """The steps since the last log line.

    Attributes:
        where: the last step.
        loss: mean over the rows.
        lr: the learning rate of the last step.
        ms_per_it: milliseconds of a step, a mean.
        rows_per_second: rows trained in a second, over all ranks.
    """

    where: StepPosition
    loss: float
    lr: float
    ms_per_it: float
    rows_per_second: float


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation.

    Attributes:
        where: the step that it follows.
        metrics: what it has found.
        best_accuracy, best_auc: the best of all evaluations so far, this one included.
        num_rows: rows that were scored, over all ranks.
        seconds: how long that took, reading included.
    """

    where: StepPosition
    metrics: Metrics
    best_accuracy: float
    best_auc: float
    num_rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows scored in a second, over all ranks."""
        return self.num_rows / self.seconds
