"""A progress bar over rows on a terminal, and nothing where there is no terminal."""

import sys
from typing import TextIO

from tqdm import tqdm

from reporting.log_lines import StepPosition
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.reporter import Reporter


class ProgressBar:
    """A bar that shows rows done, rows a second, the time that is left, and notes.

    It draws nothing if its file is no terminal. Lines that others print to the same terminal stay
    whole inside tqdm's external_write_mode, as Console prints them. As a context manager it is
    closed at the end of the block:

        with ProgressBar("predicting", num_rows) as bar:
            for batch in batches:
                ...
                bar.update(len(batch))

    Args:
        what: the work, in a word or two.
        num_rows: rows of the work; None: nobody knows, and no time that is left is shown.
        num_done: how many of them are done.
        file: the terminal; None: stdout.
    """

    def __init__(
        self,
        what: str,
        num_rows: int | None = None,
        num_done: int = 0,
        file: TextIO | None = None,
    ) -> None:
        file = sys.stdout if file is None else file  # it may be None: a program without a stdout
        self._bar: tqdm[None] | None = None
        if file is not None and file.isatty():
            self._bar = tqdm(
                total=num_rows,
                initial=num_done,
                desc=what,
                unit=" rows",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                file=file,
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, num_rows: int) -> None:
        """Note that so many more rows are done."""
        if self._bar is not None:
            self._bar.update(num_rows)

    def note(self, **values: str) -> None:
        """Show these values behind the numbers, as `name=value`, from the next time it draws on."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()


class Bars(Reporter):
    """A bar for each epoch, and below it one for each evaluation.

    Args:
        file: the terminal; None: stdout.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._training: ProgressBar | None = None
        self._evaluation: ProgressBar | None = None

    def begin_epoch(self, where: StepPosition, num_rows: int, num_done: int) -> None:
        """Draw a new bar."""
        self.close()
        self._training = ProgressBar(f"epoch {where.epoch}", num_rows, num_done, self._file)

    def end_step(self, num_rows: int) -> None:
        """Move the bar of the epoch."""
        if self._training is not None:
            self._training.update(num_rows)

    def training(self, record: TrainingRecord) -> None:
        """Show the loss."""
        if self._training is not None:
            self._training.note(loss=f"{record.loss:.4f}")

    def begin_evaluation(self, where: StepPosition, num_rows: int) -> None:
        """Draw a bar of its own."""
        self._evaluation = ProgressBar("evaluation", num_rows, file=self._file)

    def end_evaluation_batch(self, num_rows: int) -> None:
        """Move the bar of the evaluation."""
        if self._evaluation is not None:
            self._evaluation.update(num_rows)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Remove the bar of the evaluation."""
        if self._evaluation is not None:
            self._evaluation.close()

    def close(self) -> None:
        """Remove all bars."""
        for bar in (self._evaluation, self._training):
            if bar is not None:
                bar.close()
