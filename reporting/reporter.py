"""What a run tells: log lines (one function a format), bar, TensorBoard; and what a log says.

As a program it reads a log and writes the 8-way scripts' results:

    python report.py train_0.log --results=DLRM_bs32768_8p_acc.log --plot=DLRM.png ...
"""

import math
import sys
import time
from typing import Any

from tqdm import tqdm

from reporting.log_lines import (
    accuracy_line,
    calibration_line,
    metrics_line,
    testing_line,
    training_line,
)
from reporting.metrics import Metrics, remark
from reporting.results import main

# ---------------------------------------------------------------- while it runs


class Reporter:
    """Says nothing: what every rank but the first has. `Console` is its speaking twin."""

    def begin_epoch(self, epoch: int, num_batches: int, done: int) -> None:
        """A bar for the epoch's steps."""

    def step(self) -> None:
        """One more step is done."""

    def training(
        self, it: int, num_batches: int, epoch: int, ms_per_it: float, loss: float, step: int
    ) -> None:
        """Losses since the last line; `step` counts over epochs."""

    def evaluation(
        self, where: tuple[int, int, int], metrics: Metrics, best: tuple[float, float], step: int
    ) -> None:
        """An evaluation at `where` = (it, batches, epoch); `best` = (accuracy, auc) includes it."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def close(self) -> None:
        """The run has ended."""


class Console(Reporter):
    """The first rank's: log lines, a bar on a terminal, TensorBoard where a folder is named."""

    def __init__(self, full_metrics: bool, wall_time: bool, tensor_board: str) -> None:
        self._full_metrics, self._wall_time, self._folder = full_metrics, wall_time, tensor_board
        self._bar: tqdm[Any] | None = None
        self._writer: Any = None

    def begin_epoch(self, epoch: int, num_batches: int, done: int) -> None:
        """A new bar."""
        self._close_bar()
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=num_batches, initial=done, desc=f"epoch {epoch}", unit="it", leave=False
            )

    def step(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def training(
        self, it: int, num_batches: int, epoch: int, ms_per_it: float, loss: float, step: int
    ) -> None:
        """Print the line, note the loss."""
        clock = time.strftime("%H:%M") if self._wall_time else ""
        self.say(training_line(it, num_batches, epoch, ms_per_it, loss, clock))
        self._scalar("Train/Loss", loss, step)

    def evaluation(
        self, where: tuple[int, int, int], metrics: Metrics, best: tuple[float, float], step: int
    ) -> None:
        """Print the lines, note the metrics."""
        self.say(testing_line(*where))
        self.say(
            metrics_line(metrics, *best) if self._full_metrics else accuracy_line(metrics, best[0])
        )
        self.say(calibration_line(metrics))
        if text := remark(metrics):
            self.say(f"warning: {text}")
        self._scalar("Test/Acc", metrics.accuracy, step)
        self._scalar("Test/AUC", metrics.auc, step)
        self._scalar("Test/LogLoss", metrics.log_loss, step)

    def say(self, text: str) -> None:
        """Print, past the bar."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar and the TensorBoard log."""
        self._close_bar()
        if self._writer is not None:
            self._writer.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._folder and self._writer is None:
            try:
                from torch.utils.tensorboard import (
                    SummaryWriter,
                )  # takes a second: at the first line only

                self._writer = SummaryWriter(self._folder)
            except (ImportError, OSError) as error:
                self.say(f"warning: no TensorBoard log in {self._folder} ({error})")
                self._folder = ""
        if self._writer is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)


if __name__ == "__main__":
    sys.exit(main())
