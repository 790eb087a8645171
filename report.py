"""What a run tells: log lines (one function a format), bar, TensorBoard; and what a log says.

As a program it reads a log and writes the 8-way scripts' results:

    python report.py train_0.log --results=DLRM_bs32768_8p_acc.log --plot=DLRM.png ...
"""

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from command_line import ArgumentParser, UserError, number_in, reports_errors
from metrics import Metrics, remark

# ------------------------------------------------ log lines: frozen, scripts cut them with awk


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


# ---------------------------------------------------------------- what a log says


@dataclass
class LogSummary:
    """What the lines of a log hold: steps counted over epochs."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ms_per_it: list[float] = field(default_factory=list)
    test_steps: list[int] = field(default_factory=list)
    aucs: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def images_per_second(self, batch_size: int) -> float:
        """batch * 1000 / mean ms/it of `Finished` lines but the first (warm-up); nan without."""
        times = [ms for ms in self.ms_per_it[1:] if ms > 0]
        return batch_size * 1000 * len(times) / sum(times) if times else math.nan

    def train_accuracy(self) -> float:
        """The last AUC where there is one, else the last accuracy, as a fraction; nan for none."""
        aucs = [auc for auc in self.aucs if not math.isnan(auc)]
        return (aucs or self.accuracies or [math.nan])[-1]


_NUMBER = r"([-+.\deE]+|nan|inf)"
_TRAINING = re.compile(
    rf"Finished training it (\d+)/(\d+) of epoch (\d+), {_NUMBER} ms/it, loss {_NUMBER}"
)
_AUC = re.compile(rf"recall .*? auc {_NUMBER}, best auc")
_ACCURACY = re.compile(rf"accuracy {_NUMBER} %, best")


def summarise(text: str) -> LogSummary:
    """The lines of a log as numbers."""
    summary = LogSummary()
    step = 0
    for line in text.splitlines():
        if found := _TRAINING.search(line):
            it, of, epoch = (int(word) for word in found.groups()[:3])
            step = epoch * of + it
            summary.steps.append(step)
            summary.ms_per_it.append(float(found[4]))
            summary.losses.append(float(found[5]))
        elif found := _ACCURACY.search(line):
            auc = _AUC.search(line)
            summary.test_steps.append(step)
            summary.accuracies.append(float(found[1]) / 100)
            summary.aucs.append(float(auc[1]) if auc else math.nan)
    return summary


def plot(summary: LogSummary, path: Path, title: str) -> None:
    """A picture of the loss and, if evaluated, the AUC (else the accuracy) over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(summary.steps, summary.losses, color="tab:blue", label="training loss")
    axis.set(xlabel="step", ylabel="training loss (mean since the last line)", title=title)
    values, name = (
        (summary.accuracies, "accuracy")
        if all(map(math.isnan, summary.aucs))
        else (summary.aucs, "AUC")
    )
    if values:
        other = axis.twinx()
        other.plot(summary.test_steps, values, color="tab:orange", marker="o", label=f"test {name}")
        other.set_ylabel(f"test {name}")
    figure.legend(loc="outside lower center", ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def result_lines(facts: dict[str, Any]) -> str:
    """The lines of a results file: `key = value`."""
    return "".join(f"{key} = {value}\n" for key, value in facts.items())


def final_result(fps: float, accuracy: float, seconds: int) -> str:
    """The 8-way scripts' last lines."""
    return (
        "------------------ Final result ------------------\n"
        f"Final Performance images/sec : {fps:.2f}\n"
        f"Final Train Accuracy : {accuracy:.4f}\n"
        f"E2E Training Duration sec : {seconds}"
    )


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print a log's final result, write its results file, draw its picture; gives the status."""
    parser = ArgumentParser(prog="report.py", description="What a training log says.")
    parser.add_argument("log", type=Path, help="rank 0's log")
    parser.add_argument(
        "--results", type=Path, required=True, help="where the key = value lines go"
    )
    parser.add_argument("--plot", type=Path, help="where a PNG of loss and AUC over steps goes")
    parser.add_argument(
        "--batch-size", type=number_in(int, 1), required=True, help="global batch size"
    )
    parser.add_argument("--ranks", type=number_in(int, 1), required=True, help="ranks that trained")
    parser.add_argument("--device", required=True, help="npu, gpu or cpu")
    parser.add_argument(
        "--seconds", type=number_in(int, 0), required=True, help="duration of the training"
    )
    options = parser.parse_args(argv)
    try:
        summary = summarise(options.log.read_text(errors="replace"))
    except OSError as error:
        raise UserError(f"{options.log}: cannot read the log ({error.strerror})") from error
    if not summary.losses and not summary.accuracies:
        raise UserError(f"{options.log} has no `Finished training` line: nothing was trained")
    fps, accuracy = summary.images_per_second(options.batch_size), summary.train_accuracy()
    facts = {
        "Network": "DLRM",
        "RankSize": options.ranks,
        "BatchSize": options.batch_size,
        "DeviceType": options.device,
        "CaseName": options.results.stem,
        "ActualFPS": f"{fps:.2f}",
        "TrainAccuracy": f"{accuracy:.4f}",
        "ActualLoss": f"{summary.losses[-1]:.6f}" if summary.losses else "nan",
    }
    options.results.write_text(result_lines(facts))
    if options.plot:
        plot(summary, options.plot, options.results.stem)
    print(final_result(fps, accuracy, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
