"""--report: collects what a run tells, and writes a page of it when the run ends."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import TerminatedError, UserError
from common.termination import ends_on_signals, held_back
from common.versions import problem_of_import
from common.whole_files import check_place, target_of, write_whole
from reporting.collected import Collected
from reporting.history import History
from reporting.log_lines import StepPosition
from reporting.memory_use import memory_use
from reporting.metrics_file import read_lines
from reporting.phase_table import Row
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.report_page import page
from reporting.reporter import Reporter
from reporting.run_facts import RunFacts
from reporting.score_curves import ScoreCurves


def check_report_options(options: argparse.Namespace) -> None:
    """Raise a UserError now if a file of --report or --metrics-file cannot be written later."""
    report, metrics = options.report, options.metrics_file
    for flag, path in (("--report", report), ("--metrics-file", metrics)):
        if path:
            check_place(f"{flag}={path}", Path(path))
    if metrics:
        _check_appendable(Path(metrics))
    if report and metrics and target_of(Path(report)) == target_of(Path(metrics)):
        raise UserError(f"--report and --metrics-file are both {report}: name two files")
    if report and (problem := problem_of_import("matplotlib", _import_charts)):
        raise UserError(f"--report: {problem}")


def _import_charts() -> None:
    from matplotlib.backends import backend_svg  # noqa: F401


def _check_appendable(path: Path) -> None:
    try:
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--metrics-file={path} cannot be written ({error.strerror}): name another file"
        ) from error


class ReportFile(Reporter):
    """Collects what the page shows, and writes it when the run has ended, however it ended.

    Nothing is written if the run had nothing to tell: no log line and no evaluation.

    Args:
        path: the page; it appears whole or not at all.
        metrics_file: where lines of before a resume may be; None: nowhere.
        device: the device whose memory is told.
        say: prints a line.
    """

    wants_page = True

    def __init__(
        self,
        path: Path,
        metrics_file: Path | None,
        device: torch.device,
        say: Callable[[str], object],
    ) -> None:
        self._path, self._metrics_file, self._device, self._say = path, metrics_file, device, say
        self._earlier_bytes = _size_of(metrics_file)  # what is there now, other runs have written
        self._found = Collected(began=time.time())
        self._clock = time.monotonic()
        self._has_lines = False

    def note_facts(self, facts: RunFacts) -> None:
        """Keep them."""
        self._found.facts = facts

    def begin_epoch(self, where: StepPosition, num_rows: int, num_done: int) -> None:
        """With the first one, read the history of a run that goes on."""
        found = self._found
        if found.is_training:
            return
        found.is_training, found.first_step = True, where.step
        if where.step and self._metrics_file:
            own, found.history = found.history, History()
            found.history.add_lines(self._earlier_lines(), where.step)
            found.is_history_known = bool(found.history.training.steps)
            _add_evaluations(found.history, own)

    def training(self, record: TrainingRecord) -> None:
        """Keep the line."""
        self._has_lines = True
        self._found.history.training.add(record.where.step, vars(record))

    def note_curves(self, curves: ScoreCurves) -> None:
        """Keep them in place of those of an earlier evaluation."""
        self._found.curves = curves

    def evaluation(self, record: EvaluationRecord) -> None:
        """Keep the metrics."""
        self._has_lines = True
        self._found.last_evaluation = record
        best = {"best_auc": record.best_auc, "best_accuracy": record.best_accuracy}
        self._found.history.evaluations.add(record.where.step, vars(record.metrics) | best)

    def begin_evaluation(self, where: StepPosition, num_rows: int) -> None:
        """Forget the curves of the evaluation before."""
        self._found.curves = None

    def note_phases(self, rows: Sequence[Row]) -> None:
        """Keep the table."""
        self._found.phases = rows

    def end_run(self, error: BaseException | None = None) -> None:
        """Keep the error."""
        if error is not None and not self._found.error:
            self._found.error = _sentence(error)

    def close(self) -> None:
        """Write the page; a signal that comes meanwhile ends the run after it."""
        if not self._has_lines:
            return
        self._has_lines = False
        found = self._found
        found.seconds, found.memory = time.monotonic() - self._clock, memory_use(self._device)
        with ends_on_signals(_do_nothing), held_back():
            self._write()

    def _write(self) -> None:
        def write(file: BinaryIO) -> None:
            file.write(page(self._found).encode())

        try:
            write_whole([(target_of(self._path), write)])
        except OSError as error:
            reason = error.strerror or error
            self._say(f"warning: --report={self._path} cannot be written ({reason})")
        else:
            self._say(f"report: {self._path}")

    def _earlier_lines(self) -> Iterator[dict[str, Any]]:
        assert self._metrics_file is not None
        return read_lines(self._metrics_file, self._earlier_bytes)


def _add_evaluations(history: History, own: History) -> None:
    """Add those of this run that came before its first step: one that a checkpoint owed."""
    series = own.evaluations
    for number, step in enumerate(series.steps):
        values = {name: column[number] for name, column in series.columns.items()}
        history.evaluations.add(step, values)


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    if isinstance(error, UserError | TerminatedError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _size_of(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _do_nothing(error: BaseException) -> None:
    pass
