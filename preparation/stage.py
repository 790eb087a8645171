"""Runs the tasks of a stage, with a progress bar."""

import contextlib
import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from preparation.crew import Crew
from preparation.work_folder import Task, WorkFolder


class StageProgress:
    """The progress bar of the stage that runs; the stage's tasks report to it from any thread."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._bar = tqdm(disable=True)
        self._sizes: Counter[str] = Counter()  # by task: how much of its size is done
        self._num_rows = 0

    @property
    def seconds(self) -> float:
        """Seconds since the preparation began."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def stage(self, name: str, tasks: Sequence[Task]) -> Iterator[None]:
        """Show the bar of a stage: in bytes, or in columns if each task has size 1."""
        total = sum(task.size for task in tasks)
        unit = "B" if total > len(tasks) else " columns"
        with tqdm(
            total=total, unit=unit, unit_scale=True, desc=name, disable=None, leave=False
        ) as bar:
            self._bar, self._sizes, self._num_rows = bar, Counter(), 0
            yield

    def advance(self, task_name: str, size: int, num_rows: int) -> None:
        """Report that `size` more of a task and `num_rows` more rows are done."""
        self._sizes[task_name] += size
        self._num_rows += num_rows
        if self._num_rows and not self._bar.disable:
            speed = self._num_rows / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{speed:,.0f} rows/s", refresh=False)
        self._bar.update(size)

    def finish(self, task: Task) -> None:
        """Report that the rest of a task is done."""
        self.advance(task.name, task.size - self._sizes[task.name], 0)


def run_stage(
    name: str,
    tasks: Sequence[Task],
    folder: WorkFolder,
    crew: Crew,
    progress: StageProgress,
    done: Callable[[Task], None] = lambda _: None,
) -> None:
    """Have all tasks done by the crew and by whoever shares the folder.

    Args:
        name: the stage's name, for the progress bar.
        tasks: the tasks of the stage.
        folder: the work folder that holds the tasks' files.
        crew: its threads work on the tasks.
        progress: shows the stage's bar.
        done: called for each task whose file is there.
    """

    def finished(task: Task) -> None:
        progress.finish(task)
        done(task)

    with progress.stage(name, tasks):
        folder.run(tasks, crew, finished)
    _return_freed_memory()


def _return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps what a thread freed for that thread, and the next stage has other threads.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
