"""Log lines of training and evaluation: frozen, scripts cut them with awk."""

from reporting.metrics import Metrics


def training_line(
    it: int, num_batches: int, epoch: int, ms_per_it: float, loss: float, wall_time: str = ""
) -> str:
    """Comma-field 2 holds ms/it, 3 the loss."""
    clock = f" ({wall_time})" if wall_time else ""
    return (
        f"Finished training it {it}/{num_batches} of epoch {epoch}, {ms_per_it:.2f} ms/it,"
        f" loss {loss:.6f}{clock}"
    )


def testing_line(it: int, num_batches: int, epoch: int) -> str:
    """Stands before the line of an evaluation."""
    return f"Testing at - {it}/{num_batches} of epoch {epoch},"


def accuracy_line(metrics: Metrics, best_accuracy: float) -> str:
    """An evaluation without --mlperf-logging."""
    return f" accuracy {metrics.accuracy * 100:.3f} %, best {best_accuracy * 100:.3f} %"


def metrics_line(metrics: Metrics, best_accuracy: float, best_auc: float) -> str:
    """An evaluation with --mlperf-logging: blank-field 10 holds the AUC."""
    return (
        f"recall {metrics.recall:.4f}, precision {metrics.precision:.4f},"
        f" f1 {metrics.f1:.4f}, ap {metrics.ap:.4f},"
        f" auc {metrics.auc:.4f}, best auc {best_auc:.4f},"
        f" accuracy {metrics.accuracy * 100:.3f} %, best accuracy {best_accuracy * 100:.3f} %"
    )


def calibration_line(metrics: Metrics) -> str:
    """Follows every evaluation's line: what the original does not print."""
    return f"log loss {metrics.log_loss:.6f}, base rate {metrics.base_rate:.6f}"
