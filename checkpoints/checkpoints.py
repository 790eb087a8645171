"""The checkpoints of a run: when they are saved, and where the run goes on."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.folder import FLAG, CheckpointFolder
from checkpoints.options import CheckpointOptions
from checkpoints.recipe import Recipe, facts_of, flags_of
from checkpoints.resuming import resume
from checkpoints.run_state import RunState
from checkpoints.saver import Saver
from common.errors import UserError
from common.termination import end_as_asked, finishes_first, is_asked, show_life
from criteo.prepared import Prepared
from ranks.collectives import agreed
from ranks.meeting import Meetings
from ranks.process import Process

HALF = 0.5  # of the way to the first save, after which memory for a copy is got ready


class NoCheckpoints:
    """The checkpoints of a run that has no --checkpoint-dir: it saves none.

    Args:
        say: prints a line, on the first rank.
        model_file: the path of --save-model; empty: none.
    """

    def __init__(self, say: Callable[[str], None] = print, model_file: str = "") -> None:
        self._say, self._model_file = say, model_file

    @property
    def will_restore(self) -> bool:
        """Whether all of the model comes from a checkpoint, or the run ends with an error."""
        return False

    def __enter__(self) -> "NoCheckpoints":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def begin(self, run: RunState) -> bool:
        """Go on from a checkpoint if the flags ask for it; returns whether the run does.

        Raises:
            UserError: the checkpoint is none of this run's, or there is no room for the next ones.
        """
        return False

    @contextlib.contextmanager
    def training(self, run: RunState) -> Iterator[None]:
        """Training; if a signal ends it, the user is told what is lost."""
        first = run.step
        try:
            yield
        except BaseException:
            if is_asked():
                self._say(self._what_is_lost(run, run.step - first))
            raise

    def _what_is_lost(self, run: RunState, num_steps: int) -> str:
        flags = f"{FLAG}=DIR and --save-every=N keep them, --resume goes on"
        if run.progress.saved:
            lost = f"the steps since the evaluation that chose {self._model_file} are lost"
        else:
            lost = f"{num_steps} steps are lost, no file has them"
        return f"ended at step {run.step}: {lost}: {flags}"

    def after_step(self, run: RunState) -> None:
        """Save if it is time to.

        Raises:
            TerminatedError, KeyboardInterrupt: a signal has come to some rank; the run is saved.
            UserError: a step's loss was not finite, with --on-nan=stop.
        """

    def is_asked_in_evaluation(self) -> bool:
        """Whether to leave an evaluation after one of its batches because a signal has come."""
        return False

    def save_and_end(self, run: RunState) -> None:
        """Save the run because a signal has come to some rank, and end it.

        Raises:
            TerminatedError, KeyboardInterrupt: in any case.
        """

    def finish(self, run: RunState) -> None:
        """Save the run at its end."""


class ResumeOnly(NoCheckpoints):
    """Goes on from --resume=PATH and saves nothing.

    Args:
        options: the flags of checkpoints.
        recipe: what this run trains.
        say, model_file: as for NoCheckpoints.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        recipe: Recipe,
        say: Callable[[str], None],
        model_file: str,
    ) -> None:
        super().__init__(say, model_file)
        self._options, self._recipe = options, recipe

    @property
    def will_restore(self) -> bool:
        """It will."""
        return True

    def begin(self, run: RunState) -> bool:
        """Go on from the checkpoint."""
        has_resumed = resume(self._options, run, self._recipe, self._say) is not None
        if has_resumed and self._model_file and run.progress.saved:
            self._look_for_best_model(run)
        return has_resumed

    def _look_for_best_model(self, run: RunState) -> None:
        """Tell that the best model is missing, as checkpoints have only the last one."""
        path, progress = self._model_file, run.progress
        if not agreed(run.model.process, lambda: path if Path(path).exists() else ""):
            progress.saved = False
            self._say(
                f"warning: --save-model={path} is missing, where the run has saved the model of"
                f" it {progress.saved_iter} of epoch {progress.saved_epoch}, and no checkpoint has"
                " it: put that file there, or only a better model will be saved"
            )


class Checkpoints(ResumeOnly):
    """The checkpoints in --checkpoint-dir.

    Args:
        options: the flags of checkpoints.
        process: this rank.
        recipe: what this run trains.
        say, model_file: as for NoCheckpoints.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        process: Process,
        recipe: Recipe,
        say: Callable[[str], None],
        model_file: str,
    ) -> None:
        super().__init__(options, recipe, say, model_file)
        assert options.folder is not None
        self._process = process
        self._folder = CheckpointFolder(options.folder, options.keep)
        self._saver = Saver(self._folder, process, recipe, say)
        self._meetings, self._has_room = Meetings(process), False
        self._is_evaluating = False

    def __enter__(self) -> "Checkpoints":
        """Keep the folder, against other runs.

        Raises:
            UserError: it cannot be written, another run has it, or it has checkpoints already and
                nothing says that this run goes on from them.
        """
        with contextlib.ExitStack() as stack:
            self._has_some = bool(agreed(self._process, lambda: self._open(stack)))
            self._stack = stack.pop_all()
        return self

    @property
    def will_restore(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._options.resumes and (self._has_some or self._options.resume_from is not None)

    def __exit__(self, *error: object) -> None:
        self._saver.abandon()
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> str:
        stack.enter_context(self._folder.opened())
        there = self._folder.checkpoints()
        start = self._options.resume_from
        if there and start is not None and not self._is_inside(start):
            raise UserError(
                f"{FLAG}={self._folder.path} has checkpoints ({there[0].path.name} is the newest),"
                f" which a run that goes on from --resume={start} would replace: name another"
                " folder, or give --resume without a path to go on from the newest one"
            )
        if there and not self._options.resumes:
            raise UserError(
                f"{FLAG}={self._folder.path} already has checkpoints"
                f" ({there[0].path.name} is the newest): --resume goes on from it;"
                " to start anew, name another folder or remove this one"
            )
        return there[0].path.name if there else ""

    def _is_inside(self, checkpoint: Path) -> bool:
        path, folder = checkpoint.resolve(), self._folder.path.resolve()
        return folder in (path, path.parent)

    def begin(self, run: RunState) -> bool:
        """Go on from a checkpoint if the flags ask for it; check that the next ones have room."""
        has_resumed = self._options.resumes and super().begin(run)
        if has_resumed and not run.place.owes_evaluation:
            self._saver.last_step = run.step  # as it is in the folder already
        num_bytes = run.num_bytes

        def check() -> str:
            self._folder.check_space(num_bytes)
            if run.model.vocabulary is not None:
                self._folder.keep_vocabulary(run.model.vocabulary)
            return ""

        agreed(self._process, check)
        return has_resumed

    @contextlib.contextmanager
    def training(self, run: RunState) -> Iterator[None]:
        """Training; a signal ends it after the last checkpoint."""
        self._saver.costs.began = self._saver.costs.last = time.monotonic()
        with finishes_first():
            show_life()
            yield

    def after_step(self, run: RunState) -> None:
        """Save if it is time to, and let a checkpoint appear that has been written."""
        show_life()
        self._note_work(is_evaluating=False)
        step = run.step
        is_time = self._options.every > 0 and step % self._options.every == 0
        is_meeting = self._meetings.is_due()
        if not (is_time or is_meeting):
            return
        part = self._part_of_way(step)
        is_time = is_time or self._options.minutes > 0 and self._minutes() >= self._options.minutes
        flags = [is_asked(), is_time, self._saver.is_writing, not self._has_room and part >= HALF]
        somebody_asked, is_time, somebody_writes, wants_room = self._meetings.hold(flags)
        if somebody_asked:
            self.save_and_end(run)
        if is_time:
            self._saver.save(run, may_go_on=True)
            return
        if not somebody_writes:
            self._saver.complete()
        if wants_room:
            self._saver.make_room(run, max(part, HALF))
            self._has_room = True

    def _note_work(self, is_evaluating: bool) -> None:
        if is_evaluating != self._is_evaluating:  # a batch may take a thousand times as long
            self._is_evaluating = is_evaluating
            self._meetings.begin_other_work()

    def _minutes(self) -> float:
        """Minutes since the last save, or since training began."""
        return (time.monotonic() - self._saver.costs.last) / 60

    def _part_of_way(self, step: int) -> float:
        """The part of the way from the last save to the next one, by steps or by minutes."""
        every, minutes = self._options.every, self._options.minutes
        by_steps = step % every / every if every else 0.0
        return max(by_steps, self._minutes() / minutes if minutes else 0.0)

    def save_and_end(self, run: RunState) -> None:
        """Save the run because a signal has come to some rank, and end it."""
        self._say("asked to end: the run is saved first, unless another signal comes")
        try:
            self._saver.save(run, may_go_on=False)
        except UserError as error:  # the signal's error takes the place of this one
            self._say(f"warning: it could not be saved: {error}")
        end_as_asked()

    def is_asked_in_evaluation(self) -> bool:
        """Whether to leave an evaluation after one of its batches because a signal has come."""
        show_life()
        self._note_work(is_evaluating=True)
        return self._meetings.is_due() and self._meetings.hold([is_asked()])[0]

    def finish(self, run: RunState) -> None:
        """Save the run at its end."""
        self._saver.complete(is_last=True)
        if run.step != self._saver.last_step:
            self._saver.save(run, may_go_on=False)


def make_checkpoints(
    options: argparse.Namespace,
    prepared: Prepared | None,
    process: Process,
    say: Callable[[str], None],
) -> NoCheckpoints:
    """The run's checkpoints: with --checkpoint-dir, with --resume=PATH alone, or none.

    Args:
        options: the parsed command line.
        prepared: the training data, if it is Criteo's.
        process: this rank.
        say: prints a line, on the first rank.
    """
    flags = CheckpointOptions.from_options(options)
    if flags.folder is None and not flags.resumes:
        return NoCheckpoints(say, options.save_model)
    recipe = flags_of(options), facts_of(prepared)
    if flags.folder is None:
        return ResumeOnly(flags, recipe, say, options.save_model)
    return Checkpoints(flags, process, recipe, say, options.save_model)
