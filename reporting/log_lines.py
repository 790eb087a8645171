"""Log lines of training and evaluation; they are frozen, because scripts cut them with awk."""

from dataclasses import dataclass

from reporting.metrics import Metrics


@dataclass(frozen=True)
class StepPosition:
    """A step of a run: step `it` of `num_batches` in an epoch, steps from 1, epochs from 0."""

    it: int
    num_batches: int
    epoch: int

    @property
    def step(self) -> int:
        """The number of the step over all epochs, from 1."""
        return self.epoch * self.num_batches + self.it

    @property
    def epochs(self) -> float:
        """How many epochs are trained after this step."""
        return self.epoch + self.it / self.num_batches

    def __str__(self) -> str:
        return f"{self.it}/{self.num_batches} of epoch {self.epoch}"


def training_line(where: StepPosition, ms_per_it: float, loss: float, wall_time: str = "") -> str:
    """A line of training; split at commas, its field 2 holds ms/it and field 3 the loss."""
    clock = f" ({wall_time})" if wall_time else ""
    return f"Finished training it {where}, {ms_per_it:.2f} ms/it, loss {loss:.6f}{clock}"


def evaluation_line(where: StepPosition) -> str:
    """The line before the metrics of an evaluation."""
    return f"Testing at - {where},"


def accuracy_line(metrics: Metrics, best_accuracy: float) -> str:
    """The metrics of an evaluation without --mlperf-logging."""
    return f" accuracy {metrics.accuracy * 100:.3f} %, best {best_accuracy * 100:.3f} %"


def metrics_line(metrics: Metrics, best_accuracy: float, best_auc: float) -> str:
    """The metrics of an evaluation with --mlperf-logging; the 10th word is the AUC."""
    return (
        f"recall {metrics.recall:.4f}, precision {metrics.precision:.4f},"
        f" f1 {metrics.f1:.4f}, ap {metrics.ap:.4f},"
        f" auc {metrics.auc:.4f}, best auc {best_auc:.4f},"
        f" accuracy {metrics.accuracy * 100:.3f} %, best accuracy {best_accuracy * 100:.3f} %"
    )


def calibration_line(metrics: Metrics) -> str:
    """The line after the metrics of every evaluation, which the original does not print."""
    return f"log loss {metrics.log_loss:.6f}, base rate {metrics.base_rate:.6f}"


def metric_text(value: float, by_auc: bool) -> str:
    """An AUC or an accuracy with its name, which scripts that look for `auc` do not find."""
    return f"AUC {value:.4f}" if by_auc else f"accuracy {value * 100:.3f} %"


def best_line(metric: str, epoch: int, it: int, outcome: str) -> str:
    """The last line of a run that has evaluated its model.

    Args:
        metric: the best one, as `metric_text` writes it.
        epoch: number of the epoch in which it was found, from 0.
        it: batches of this epoch that were done then; 0: it was found before this run.
        outcome: what has become of the model.
    """
    where = f"at it {it} of epoch {epoch}" if it else "before this run"
    return f"best {metric} {where}, {outcome}"


def saved_line(epoch: int, it: int, path: str) -> str:
    """The last line of a run that has saved a model which no evaluation has chosen."""
    return f"model of it {it} of epoch {epoch} saved in {path}"


def size_line(what: str, bits: int, before: int, after: int) -> str:
    """The line about a part of a model that may be quantized: its bytes before and after."""
    if bits == 32:
        return f"{what}: {before:,} bytes, not quantized"
    return f"{what}: {before:,} bytes, {after:,} with {bits} bits, {before / after:.2f} times less"


def speed_line(num_rows: int, seconds: float) -> str:
    """The line about the time of an evaluation, reading included."""
    return f"evaluated {num_rows} rows in {seconds:.2f} s, {num_rows / seconds:.0f} rows/s"
