"""Saves checkpoints: between two steps, or from a copy while training goes on."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints.folder import CheckpointFolder
from checkpoints.index import Index, ShardFile
from checkpoints.matrices import HeldRows, held_rows, matrix_shapes
from checkpoints.recipe import Recipe
from checkpoints.run_state import RunState
from checkpoints.writer import BackgroundWriting, CopiedRows, Written, trouble_of, write_rows
from common.free_memory import free_memory
from common.launch import Launch
from common.termination import waits_for_others
from ranks.collectives import agreed, any_rank, texts_of_all
from ranks.process import Process

MOST_OF_RUN = 0.02  # share of a run that steps may stand still for a save between them
SECONDS_A_SAVE, BYTES_A_SECOND = 0.05, 200e6  # what a save is thought to cost before one was made
MEMORY_LEFT = 1.25  # times the copy's bytes have to be free for it


@dataclass
class Costs:
    """What checkpoints cost, on this rank.

    Attributes:
        began: when training began, of time.monotonic.
        last: when the last save began, or training.
        stood_still: seconds of all saves in which no step was made.
        writing: seconds that the last save took to be written; None before the first one.
    """

    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    stood_still: float = 0.0
    writing: float | None = None

    @property
    def share(self) -> float:
        """Part of the run so far in which no step was made because of saves."""
        return self.stood_still / max(time.monotonic() - self.began, 1e-9)

    def is_large(self, num_bytes: int, part: float = 1.0) -> bool:
        """Whether a save between two steps would be more than MOST_OF_RUN of the time per save.

        Args:
            num_bytes: that this rank writes.
            part: which part of that time has passed since the last save.
        """
        seconds = self.writing
        if seconds is None:
            seconds = SECONDS_A_SAVE + num_bytes / BYTES_A_SECOND
        return seconds > MOST_OF_RUN * (time.monotonic() - self.last) / part


@dataclass
class _Save:
    """A checkpoint that is being written.

    Attributes:
        step: training steps done, over all epochs.
        index: what it holds, without its files.
        partial: its folder; empty if that could not be made.
        trouble: why it could not.
        began: when, of time.monotonic.
        stood_still: seconds so far in which no step was made because of it.
        is_last: no step follows it.
        background: the thread that writes; None: no thread does.
    """

    step: int
    index: Index
    partial: str
    trouble: str
    began: float
    stood_still: float = 0.0
    is_last: bool = False
    background: BackgroundWriting | None = None


class Saver:
    """Writes a run's checkpoints, one at a time. All ranks call each method.

    Args:
        folder: where they go; the first rank has opened it.
        process: this rank.
        recipe: what the run trains.
        say: prints a line, on the first rank.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        process: Process,
        recipe: Recipe,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._process, self._recipe, self._say = folder, process, recipe, say
        self.costs = Costs()
        self._save: _Save | None = None
        self._copy = CopiedRows()
        self._has_failed, self._has_told_of_memory = False, False
        self.last_step = -1  # of the newest checkpoint

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        background = self._save.background if self._save else None
        return background is not None and not background.is_done

    def save(self, run: RunState, may_go_on: bool) -> None:
        """Save the run as it is now.

        Args:
            run: the run, between two steps.
            may_go_on: training goes on after it, so it may be written meanwhile.

        Raises:
            UserError: a step's loss was not finite, with --on-nan=stop.
        """
        self.complete()
        began = time.monotonic()
        save = self._save = self._begin(run, began)
        rows = self._rows_to_write(run)
        if may_go_on and save.partial and self._goes_on_meanwhile(rows):
            copied = self._copy.take(rows)
            save.background = BackgroundWriting(Path(save.partial), self._process.rank, copied)
        written = Written()
        if save.partial and save.background is None:
            written = write_rows(Path(save.partial), self._process.rank, rows)
        save.stood_still, save.is_last = time.monotonic() - began, not may_go_on
        self.costs.last = began
        if save.background is None:
            self._finish(save, written)

    def make_room(self, run: RunState, part: float) -> None:
        """Get memory for a copy ready, if the next save will need one.

        Args:
            run: the run.
            part: which part of the time to that save has passed.
        """
        rows = self._rows_to_write(run)
        if self._goes_on_meanwhile(rows, part) and not self._copy.has_room:
            self._copy.make_room(rows)

    def complete(self, is_last: bool = False) -> None:
        """Wait until a checkpoint that is being written is complete; then it appears.

        Args:
            is_last: no step follows, so that none stands still.
        """
        save = self._save
        if save is None or save.background is None:
            return
        began = time.monotonic()
        written = save.background.wait()
        save.stood_still += time.monotonic() - began
        save.is_last = is_last
        self._finish(save, written)

    def abandon(self) -> None:
        """Give up the checkpoint that is being written, on this rank alone, as the run has failed.

        Its thread fails when its folder is gone.
        """
        save, self._save = self._save, None
        if save is None:
            return
        if self._process.is_first and save.partial:
            shutil.rmtree(save.partial, ignore_errors=True)

    def _rows_to_write(self, run: RunState) -> list[HeldRows]:
        """The rows that this rank writes."""
        is_first = self._process.is_first
        return [held for held in held_rows(run.model) if is_first or not held.is_shared]

    def _begin(self, run: RunState, began: float) -> _Save:
        flags, facts = self._recipe
        index = Index(flags, facts, matrix_shapes(run.model), (), run.as_json())

        def make_folder() -> str:
            try:
                return json.dumps([str(self._folder.begin(run.step)), ""])
            except OSError as error:
                return json.dumps(["", trouble_of(error, self._folder.path)])

        partial, trouble = json.loads(agreed(self._process, make_folder))
        return _Save(run.step, index, partial, trouble, began)

    def _goes_on_meanwhile(self, rows: list[HeldRows], part: float = 1.0) -> bool:
        """Whether a checkpoint is written from a copy, while training goes on."""
        num_bytes = sum(held.num_bytes for held in rows)
        room = free_memory() / Launch.from_environment().local_world_size
        has_room = self._copy.has_room or MEMORY_LEFT * num_bytes < room
        answers = [self.costs.is_large(num_bytes, part), not has_room]
        is_large, lacks_room = any_rank(self._process, answers)
        if is_large and lacks_room and not self._has_told_of_memory:
            self._has_told_of_memory = True
            self._say(
                f"checkpoints are saved between steps: a copy of {num_bytes / 1e9:.3g} GB a rank,"
                " to write them while training goes on, has no room in memory"
            )
        return is_large and not lacks_room

    def _finish(self, save: _Save, written: Written) -> None:
        """Let the checkpoint appear if all ranks have written their files, or give it up."""
        began = time.monotonic()
        self.costs.writing = began - save.began
        self._save = None
        files = json.dumps([file.to_json() for file in written.files])
        with waits_for_others():
            of_ranks = texts_of_all(self._process, json.dumps([written.trouble, files]))
            # all wait for the first one: launchers end it when a rank that was asked has ended
            trouble = agreed(self._process, lambda: self._publish_all(save, of_ranks))
        if not trouble:
            self.last_step = save.step
        save.stood_still += time.monotonic() - began
        self.costs.stood_still += 0 if save.is_last else save.stood_still
        if self._process.is_first and not self._has_failed:
            self._tell(save)

    def _publish_all(self, save: _Save, of_ranks: list[str]) -> str:
        """Publish what the ranks tell of; returns why that could not be done, or nothing."""
        troubles, texts = zip(*map(json.loads, of_ranks), strict=True)
        trouble = save.trouble or next(filter(None, troubles), "")
        found = [ShardFile.from_json(file) for text in texts for file in json.loads(text)]
        return self._publish(save, found, trouble)

    def _publish(self, save: _Save, files: list[ShardFile], trouble: str) -> str:
        if not trouble:
            try:
                own = save.index
                index = Index(own.flags, own.data, own.matrices, files, own.state)
                path = self._folder.publish(Path(save.partial), index)
                save.partial, save.index = str(path), index
            except OSError as error:
                trouble = trouble_of(error, save.partial)
        if trouble and save.partial:
            shutil.rmtree(save.partial, ignore_errors=True)
        if trouble and (save.is_last or not self._has_failed):
            then = "training goes on, and the next save tries again"
            if save.is_last:
                then = "a resumed run goes on from the checkpoint before, if there is one"
            what = f"the checkpoint of step {save.step} could not be saved ({trouble})"
            self._say(f"warning: {what}; {then}")
        elif self._has_failed and not trouble:
            self._say("checkpoints can be saved again")
        self._has_failed = bool(trouble)
        return trouble

    def _tell(self, save: _Save) -> None:
        seconds, size = time.monotonic() - save.began, _size_text(save.index.num_bytes)
        share = f"{100 * self.costs.share:.2g} % of the run so far"
        how = f"steps stood still for {save.stood_still:.2f} s, {share}"
        if save.is_last:
            how = "after the last step"
        elif save.background is not None:
            how = f"while training went on; {how}"
        self._say(f"checkpoint {Path(save.partial).name}: {size} in {seconds:.2f} s, {how}")


def _size_text(num_bytes: int) -> str:
    """A size as people write it, with three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
