"""What a run tells while it trains: log lines, a progress bar, TensorBoard."""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from reporting.log_lines import (
    StepPosition,
    accuracy_line,
    calibration_line,
    evaluation_line,
    metrics_line,
    training_line,
)
from reporting.metrics import Metrics, remark


class Reporter:
    """Reports nothing: the reporter of every rank but the first, which has a Console.

    As a context manager it ends the run's report, and knows the error that ended the run.
    """

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_run(error)
        self.close()

    def note_continued(self, what: str) -> None:
        """Note that training goes on from something, and does not begin with fresh weights."""

    def note_stopped(self, why: str) -> None:
        """Note why training stops although no threshold is reached; empty: it goes on."""

    def begin_run(
        self, num_train: int, num_test: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        """Begin to train, before the first batch is loaded.

        Args:
            num_train: rows of an epoch, over all ranks.
            num_test: rows of an evaluation.
            bottom, top: widths of the MLPs, their inputs first.
        """

    def begin_epoch(self, epoch: int, num_batches: int, num_done: int) -> None:
        """Begin an epoch of `num_batches` steps, of which `num_done` are done."""

    def end_step(self) -> None:
        """Note that one more step is done."""

    def training(self, where: StepPosition, ms_per_it: float, loss: float) -> None:
        """Report the mean loss and the mean time of a step since the last report.

        Args:
            where: the last step.
            ms_per_it: milliseconds; -1: not measured.
            loss: mean over the rows.
        """

    def begin_evaluation(self, where: StepPosition) -> None:
        """Note that an evaluation begins after a step."""

    def evaluation(self, where: StepPosition, metrics: Metrics, best: tuple[float, float]) -> None:
        """Report an evaluation.

        Args:
            where: the step that it follows.
            metrics: the evaluation's metrics.
            best: accuracy and AUC of the best evaluations so far, this one included.
        """

    def say(self, text: str) -> None:
        """Print a line of its own."""

    def end_run(self, error: BaseException | None = None) -> None:
        """Note that training has ended; only the first call counts.

        Args:
            error: what ended it, if it did not end by itself.
        """

    def close(self) -> None:
        """Free what the report needs."""


class Console(Reporter):
    """Prints log lines, draws a bar if it prints to a terminal, and writes TensorBoard's files.

    Args:
        full_metrics: print all metrics of an evaluation, not only the accuracy.
        wall_time: print the time of day at the end of training lines.
        tensor_board: TensorBoard's folder; empty: none is written.
    """

    def __init__(self, full_metrics: bool, wall_time: bool, tensor_board: str) -> None:
        self._full_metrics, self._wall_time, self._folder = full_metrics, wall_time, tensor_board
        self._bar: tqdm[Any] | None = None
        self._writer: Any = None

    def begin_epoch(self, epoch: int, num_batches: int, num_done: int) -> None:
        """Draw a new bar."""
        self._close_bar()
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=num_batches, initial=num_done, desc=f"epoch {epoch}", unit="it", leave=False
            )

    def end_step(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def training(self, where: StepPosition, ms_per_it: float, loss: float) -> None:
        """Print the line and write the loss."""
        clock = time.strftime("%H:%M") if self._wall_time else ""
        self.say(training_line(where, ms_per_it, loss, clock))
        self._write_scalar("Train/Loss", loss, where.step)

    def evaluation(self, where: StepPosition, metrics: Metrics, best: tuple[float, float]) -> None:
        """Print the lines and write the metrics."""
        self.say(evaluation_line(where))
        self.say(
            metrics_line(metrics, *best) if self._full_metrics else accuracy_line(metrics, best[0])
        )
        self.say(calibration_line(metrics))
        if text := remark(metrics):
            self.say(f"warning: {text}")
        self._write_scalar("Test/Acc", metrics.accuracy, where.step)
        self._write_scalar("Test/AUC", metrics.auc, where.step)
        self._write_scalar("Test/LogLoss", metrics.log_loss, where.step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar and TensorBoard's file."""
        self._close_bar()
        if self._writer is not None:
            self._writer.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write_scalar(self, name: str, value: float, step: int) -> None:
        if self._folder and self._writer is None:
            try:
                # the import takes a second, so it waits for the first line
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder)
            except Exception as error:  # a tensorboard that does not go with its protobuf or numpy
                reason = " ".join(str(error).split())
                self.say(f"warning: no TensorBoard log in {self._folder} ({reason})")
                self._folder = ""
        if self._writer is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)
