"""What can be told while a run goes on. Each listener takes of it what it is interested in."""

import contextlib
from collections.abc import Sequence
from types import TracebackType

from reporting.log_lines import StepPosition
from reporting.phase_table import Row
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.run_facts import RunFacts
from reporting.score_curves import ScoreCurves


class Reporter:
    """Reports nothing: the reporter of every rank but the first, which has Listeners.

    As a context manager it ends the run's report, and knows the error that ended the run.
    """

    wants_page = False  # whether a page is made at the end, of facts and curves

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end_run(error)
        finally:
            self.close()

    def note_continued(self, what: str) -> None:
        """Note that training goes on from something, and does not begin with fresh weights."""

    def note_stopped(self, why: str) -> None:
        """Note why training stops although no threshold is reached; empty: it goes on."""

    def note_facts(self, facts: RunFacts) -> None:
        """Note what is known of the run before its first step."""

    def begin_run(
        self, num_train: int, num_test: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        """Begin to train, before the first batch is loaded.

        Args:
            num_train: rows of an epoch, over all ranks.
            num_test: rows of an evaluation.
            bottom, top: widths of the MLPs, their inputs first.
        """

    def begin_epoch(self, where: StepPosition, num_rows: int, num_done: int) -> None:
        """Begin an epoch, or go on with one.

        Args:
            where: the last step that is done; its `it` is 0 where the epoch begins.
            num_rows: rows of the epoch, over all ranks.
            num_done: how many of them are done.
        """

    def end_step(self, num_rows: int) -> None:
        """Note that one more step is done, on so many rows of all ranks."""

    def training(self, record: TrainingRecord) -> None:
        """Report the steps since the last report."""

    def begin_evaluation(self, where: StepPosition, num_rows: int) -> None:
        """Note that an evaluation of so many rows begins after a step."""

    def end_evaluation_batch(self, num_rows: int) -> None:
        """Note that so many more rows are scored, over all ranks."""

    def note_curves(self, curves: ScoreCurves) -> None:
        """Note the curves of the evaluation that is going to be reported next."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Report an evaluation."""

    def note_phases(self, rows: Sequence[Row]) -> None:
        """Note how the time of a step is divided, with --enable-profiling."""

    def say(self, text: str) -> None:
        """Print a line of its own."""

    def end_run(self, error: BaseException | None = None) -> None:
        """Note that training has ended; only the first call counts.

        Args:
            error: what ended it, if it did not end by itself.
        """

    def close(self) -> None:
        """Free what the report needs."""


class Listeners(Reporter):
    """Tells everything to several reporters, in their order.

    Args:
        listeners: the reporters.
    """

    def __init__(self, *listeners: Reporter) -> None:
        self._all = listeners
        self.wants_page = any(one.wants_page for one in listeners)

    def note_continued(self, what: str) -> None:
        """Tell all."""
        for one in self._all:
            one.note_continued(what)

    def note_stopped(self, why: str) -> None:
        """Tell all."""
        for one in self._all:
            one.note_stopped(why)

    def note_facts(self, facts: RunFacts) -> None:
        """Tell all."""
        for one in self._all:
            one.note_facts(facts)

    def begin_run(
        self, num_train: int, num_test: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        """Tell all."""
        for one in self._all:
            one.begin_run(num_train, num_test, bottom, top)

    def begin_epoch(self, where: StepPosition, num_rows: int, num_done: int) -> None:
        """Tell all."""
        for one in self._all:
            one.begin_epoch(where, num_rows, num_done)

    def end_step(self, num_rows: int) -> None:
        """Tell all."""
        for one in self._all:
            one.end_step(num_rows)

    def training(self, record: TrainingRecord) -> None:
        """Tell all."""
        for one in self._all:
            one.training(record)

    def begin_evaluation(self, where: StepPosition, num_rows: int) -> None:
        """Tell all."""
        for one in self._all:
            one.begin_evaluation(where, num_rows)

    def end_evaluation_batch(self, num_rows: int) -> None:
        """Tell all."""
        for one in self._all:
            one.end_evaluation_batch(num_rows)

    def note_curves(self, curves: ScoreCurves) -> None:
        """Tell all."""
        for one in self._all:
            one.note_curves(curves)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Tell all."""
        for one in self._all:
            one.evaluation(record)

    def note_phases(self, rows: Sequence[Row]) -> None:
        """Tell all."""
        for one in self._all:
            one.note_phases(rows)

    def say(self, text: str) -> None:
        """Tell all; the console prints it."""
        for one in self._all:
            one.say(text)

    def end_run(self, error: BaseException | None = None) -> None:
        """Tell all, also where one of them fails."""
        with contextlib.ExitStack() as acts:
            for one in reversed(self._all):
                acts.callback(one.end_run, error)

    def close(self) -> None:
        """Close all, also where one of them fails."""
        with contextlib.ExitStack() as acts:
            for one in reversed(self._all):
                acts.callback(one.close)
