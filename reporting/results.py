"""Results of a run, from its log.

As a program it prints the last lines of the 8-way scripts and writes their results file:

    python -m reporting.results train_0.log --results=DLRM_bs32768_8p_acc.log --plot=DLRM.png ...
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, reports_errors
from common.flags import ArgumentParser, number_in
from common.versions import problem_of_import


@dataclass
class LogSummary:
    """The numbers in a log.

    Attributes:
        steps: numbers of the steps with a training line, counted over epochs.
        losses, ms_per_it: the values in the training lines.
        test_steps: steps that an evaluation follows.
        aucs, accuracies, log_losses: those of the evaluations, the first two as fractions; an AUC
            or a log loss that is not printed is nan.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ms_per_it: list[float] = field(default_factory=list)
    test_steps: list[int] = field(default_factory=list)
    aucs: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    log_losses: list[float] = field(default_factory=list)

    def forget_from(self, step: int) -> None:
        """Forget the lines of this step and later ones: a resumed run does them again."""
        while self.steps and self.steps[-1] >= step:
            for values in (self.steps, self.losses, self.ms_per_it):
                values.pop()
        while self.test_steps and self.test_steps[-1] >= step:
            for values in (self.test_steps, self.aucs, self.accuracies, self.log_losses):
                values.pop()

    def images_per_second(self, batch_size: int) -> float:
        """Rows a second: batch * 1000 / mean ms/it of all training lines but the first; or nan."""
        times = [ms for ms in self.ms_per_it[1:] if ms > 0]
        return batch_size * 1000 * len(times) / sum(times) if times else math.nan

    def train_accuracy(self) -> float:
        """The last AUC if there is one, else the last accuracy, as a fraction; else nan."""
        aucs = [auc for auc in self.aucs if not math.isnan(auc)]
        return (aucs or self.accuracies or [math.nan])[-1]


_NUMBER = r"([-+.\deE]+|nan|inf)"
_TRAINING = re.compile(
    rf"Finished training it (\d+)/(\d+) of epoch (\d+), {_NUMBER} ms/it, loss {_NUMBER}"
)
_AUC = re.compile(rf"recall .*? auc {_NUMBER}, best auc")
_LOG_LOSS = re.compile(rf"log loss {_NUMBER}, base rate")
_ACCURACY = re.compile(rf"accuracy {_NUMBER} %, best")


def summarise(text: str) -> LogSummary:
    """Read the numbers of a log."""
    summary = LogSummary()
    step = 0
    for line in text.splitlines():
        if found := _TRAINING.search(line):
            it, of, epoch = (int(word) for word in found.groups()[:3])
            step = epoch * of + it
            summary.forget_from(step)
            summary.steps.append(step)
            summary.ms_per_it.append(float(found[4]))
            summary.losses.append(float(found[5]))
        elif found := _ACCURACY.search(line):
            auc = _AUC.search(line)
            summary.test_steps.append(step)
            summary.accuracies.append(float(found[1]) / 100)
            summary.aucs.append(float(auc[1]) if auc else math.nan)
            summary.log_losses.append(math.nan)
        elif summary.log_losses and (found := _LOG_LOSS.search(line)):
            summary.log_losses[-1] = float(found[1])
    return summary


def plot(summary: LogSummary, path: Path, title: str, bayes_auc: float = math.nan) -> None:
    """Draw the AUC (else the accuracy) of evaluations, and below it all losses, into a PNG.

    Args:
        summary: the numbers; log losses are drawn if the log has any.
        path: the picture.
        title: what stands above it.
        bayes_auc: the AUC that no model can pass, as a dashed line; nan: none is known.
    """
    pyplot = _import_pyplot()
    has_auc = not all(map(math.isnan, summary.aucs))
    values, name = (summary.aucs, "AUC") if has_auc else (summary.accuracies, "accuracy")
    with pyplot.style.context(["default", {"font.size": 11, "text.parse_math": False}]):
        figure, (upper, lower) = pyplot.subplots(
            2, sharex=True, figsize=(8, 7), layout="constrained"
        )
        figure.suptitle(title)
        _draw_metric(upper, summary.test_steps, values, name)
        _draw_losses(lower, summary)
        if has_auc and math.isfinite(bayes_auc):
            words = f"Bayes AUC {bayes_auc:.4f}: no model can rank better"
            upper.axhline(bayes_auc, color="0.4", linestyle="--", label=words)
        lower.set_xlabel("step")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _draw_losses(axes: Any, summary: LogSummary) -> None:
    mean = "training loss, mean since the last line"
    axes.plot(summary.steps, summary.losses, color="tab:blue", linewidth=1, label=mean)
    if not all(map(math.isnan, summary.log_losses)):
        words = "log loss of evaluations"
        axes.plot(summary.test_steps, summary.log_losses, "o-", color="tab:orange", label=words)
    axes.set_ylabel("loss")


def _draw_metric(axes: Any, steps: Sequence[int], values: Sequence[float], name: str) -> None:
    """Draw the metric of evaluations, and mark the best one."""
    axes.set_ylabel(f"{name} of evaluations")
    known = [(value, -step) for step, value in zip(steps, values, strict=True) if value == value]
    if not known:
        return
    axes.plot(steps, values, "o-", color="tab:orange", markersize=4)
    best, step = max(known)
    words = f"best {name} {best:.4f} at step {-step:,}"
    style = {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none"}
    axes.plot([-step], [best], color="tab:red", label=words, **style)


def _import_pyplot() -> Any:
    """matplotlib's pyplot, which makes files here and never windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def value_text(value: float, digits: int) -> str:
    """The value with so many digits after the point; `none` for nan."""
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def result_lines(facts: dict[str, Any]) -> str:
    """The text of a results file: a line `key = value` for each fact."""
    return "".join(f"{key} = {value}\n" for key, value in facts.items())


def final_result(fps: float, accuracy: float, seconds: int) -> str:
    """The last lines that the 8-way scripts print: rows a second, accuracy, duration in s.

    A value that is nan is printed as `none`.
    """
    return (
        "------------------ Final result ------------------\n"
        f"Final Performance images/sec : {value_text(fps, 2)}\n"
        f"Final Train Accuracy : {value_text(accuracy, 4)}\n"
        f"E2E Training Duration sec : {seconds}"
    )


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print a log's final result, write its results file and its picture; returns the status."""
    parser = ArgumentParser(
        prog="python -m reporting.results", description="What a training log says."
    )
    parser.add_argument("log", type=Path, help="rank 0's log")
    parser.add_argument(
        "--results", type=Path, required=True, help="where the key = value lines go"
    )
    parser.add_argument("--plot", type=Path, help="where a PNG of loss and AUC over steps goes")
    parser.add_argument(
        "--bayes-auc",
        type=number_in(float, 0, 1),
        default=math.nan,
        help="an AUC that no model can pass, for a line in the PNG; nan: it is not known",
    )
    parser.add_argument(
        "--batch-size", type=number_in(int, 1), required=True, help="global batch size"
    )
    parser.add_argument("--ranks", type=number_in(int, 1), required=True, help="ranks that trained")
    parser.add_argument("--device", required=True, help="npu, gpu or cpu")
    parser.add_argument(
        "--seconds", type=number_in(int, 0), required=True, help="duration of the training"
    )
    options = parser.parse_args(argv)
    if options.plot and (problem := problem_of_import("matplotlib", _import_pyplot)):
        raise UserError(problem)
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
        "ActualFPS": value_text(fps, 2),
        "TrainAccuracy": value_text(accuracy, 4),
        "ActualLoss": value_text(summary.losses[-1] if summary.losses else math.nan, 6),
    }
    options.results.write_text(result_lines(facts))
    if options.plot:
        title = f"DLRM on {options.ranks:,} x {options.device}, batch {options.batch_size:,}"
        plot(summary, options.plot, title, options.bayes_auc)
    print(final_result(fps, accuracy, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
