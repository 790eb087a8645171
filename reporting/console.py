"""The log lines of a run on stdout."""

import time

from tqdm import tqdm

from reporting.log_lines import (
    accuracy_line,
    calibration_line,
    evaluation_line,
    metrics_line,
    training_line,
)
from reporting.metrics import remark
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.reporter import Reporter


class Console(Reporter):
    """Prints log lines.

    Args:
        full_metrics: print all metrics of an evaluation, not only the accuracy.
        step_time: print ms/it in training lines, else -1.00.
        wall_time: print the time of day at the end of training lines.
    """

    def __init__(self, full_metrics: bool, step_time: bool, wall_time: bool) -> None:
        self._full_metrics, self._step_time, self._wall_time = full_metrics, step_time, wall_time

    def training(self, record: TrainingRecord) -> None:
        """Print the line."""
        clock = time.strftime("%H:%M") if self._wall_time else ""
        ms_per_it = record.ms_per_it if self._step_time else -1.0
        self.say(training_line(record.where, ms_per_it, record.loss, clock))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the lines."""
        metrics, best_accuracy = record.metrics, record.best_accuracy
        self.say(evaluation_line(record.where))
        if self._full_metrics:
            self.say(metrics_line(metrics, best_accuracy, record.best_auc))
        else:
            self.say(accuracy_line(metrics, best_accuracy))
        self.say(calibration_line(metrics))
        if text := remark(metrics):
            self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with tqdm.external_write_mode():
            print(text, flush=True)
