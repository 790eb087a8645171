"""Tasks whose results are checked files in a folder: made once, by whoever gets to them first.

A finished file appears by a rename, so it is complete or absent. Any number of threads, processes
and machines may share the folder. Whoever works on a task holds a lock on the temporary file that
becomes the task's file; the system drops the lock of a process that dies. If the file system has no
locks (shared_folder.has_locks), two may work on the same task, and the result is still right.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from common.errors import RankError
from common.file_locks import means_no_locks
from preparation.checked_file import CheckedFile, DamagedError, Writer
from preparation.crew import Crew
from preparation.shared_folder import UNFINISHED, FolderGoneError, is_at_its_path

MAX_TRIES = 5  # attempts to make a file that can be read
PAUSE = 0.05  # seconds between looks at files that others are making

Make = Callable[[Writer], dict[str, Any]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """A file of the work folder and how it is made.

    Attributes:
        name: the path of the file, relative to the folder.
        key: the key of what the file is made from; see checked_file.key_of.
        make: writes the file's sections and returns its meta.
        size: amount of work, in the unit of the stage's progress bar.
    """

    name: str
    key: str
    make: Make
    size: int = 1


class WorkFolder:
    """The finished files of a folder.

    Attributes:
        path: where the folder is.
        built: names of the files that this process made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.built: set[str] = set()

    def file(self, task: Task) -> CheckedFile:
        """The task's file, which need not be there yet."""
        return CheckedFile(self.path / task.name, task.key)

    def discard(self, task: Task) -> None:
        """Delete the task's file if it is there."""
        (self.path / task.name).unlink(missing_ok=True)

    def read_or_rebuild(
        self, task: Task, read: Callable[[CheckedFile], Result], maker: Task | None = None
    ) -> Result:
        """Read a finished file; if it is damaged or missing, have it made again first.

        Args:
            task: the task whose file is read.
            read: reads the file, as CheckedFile.meta does; raises DamagedError if it is damaged.
            maker: the task that makes the file, if it is not `task` itself.

        Raises:
            RankError: the file is damaged however often it is made.
        """
        for _ in range(MAX_TRIES):
            try:
                return read(self.file(task))
            except DamagedError:
                while not self._discard_if_damaged(task, read):
                    time.sleep(PAUSE)
                if maker is not None:
                    self.discard(maker)
                self.ensure(maker or task)
        raise RankError(f"{self.path / task.name} is damaged whenever it is made: check the disk")

    def _discard_if_damaged(self, task: Task, read: Callable[[CheckedFile], Any]) -> bool:
        """Discard the file unless others have mended it meanwhile; False if they are at it."""
        with self._claim(self.path / task.name) as file:
            if file is None:
                return False
            with contextlib.suppress(DamagedError):
                read(self.file(task))
                return True
            self.discard(task)
        return True

    # ------------------------------------------------------------ one file

    def ensure(self, task: Task) -> None:
        """Make the task's file if it is not there, or wait for whoever makes it."""
        while not self.build(task):
            time.sleep(PAUSE)

    def build(self, task: Task) -> bool:
        """Make the task's file if it is not there.

        Returns:
            False if somebody else is making it.

        Raises:
            FolderGoneError: the folder was removed.
        """
        path = self.path / task.name
        with self._claim(path) as file:
            if file is None:
                return False
            if not self.file(task).exists():
                file.truncate(0)
                writer = Writer(file)
                writer.finish(task.key, task.make(writer))
                os.rename(file.name, path)
                self.built.add(task.name)
        return True

    @contextlib.contextmanager
    def _claim(self, path: Path) -> Iterator[IO[bytes] | None]:
        """A locked temporary file that becomes `path` by a rename; None if somebody else has it.

        At the end of the block it is deleted unless it was renamed.
        """
        name = f"{path}{UNFINISHED}"
        try:
            file = open(name, "a+b")  # noqa: SIM115
        except FileNotFoundError:
            raise FolderGoneError(str(self.path)) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                if not means_no_locks(error):
                    raise
                with _own_file(path) as own:
                    yield own
                return
            if not is_at_its_path(file):  # its maker renamed it before the lock was taken
                yield None
                return
            try:
                yield file
            finally:
                if is_at_its_path(file):
                    os.unlink(name)

    # ------------------------------------------------------------ many files

    def run(self, tasks: Sequence[Task], crew: Crew, done: Callable[[Task], None]) -> None:
        """Have the files of all tasks made, by this process and by those that share the folder.

        Args:
            tasks: the tasks; their order does not matter.
            crew: this process starts at its share of the tasks, so that few processes meet.
            done: called for each task whose file is there, in this thread.

        Raises:
            The error of the first task that fails, once those under way are finished.
        """
        first = len(tasks) * crew.rank // crew.num_processes
        waiting = [*range(first, len(tasks)), *range(first)]
        with ThreadPoolExecutor(crew.threads) as pool:
            while waiting:
                numbered = [(number, tasks[number]) for number in waiting]
                held = self._try_each(numbered, pool, crew.threads, done)
                if len(held) == len(waiting):
                    time.sleep(PAUSE)
                waiting = held

    def _try_each(
        self,
        tasks: Sequence[tuple[int, Task]],
        pool: ThreadPoolExecutor,
        num_threads: int,
        done: Callable[[Task], None],
    ) -> list[int]:
        """Try each numbered task once; returns the numbers of those that others are making."""
        held: list[int] = []
        errors: dict[int, BaseException] = {}
        under_way: dict[Future[bool], tuple[int, Task]] = {}

        def collect(futures: Iterable[Future[bool]]) -> None:
            for future in futures:
                number, task = under_way.pop(future)
                if error := future.exception():
                    errors[number] = error
                elif future.result():
                    done(task)
                else:
                    held.append(number)

        for number, task in tasks:
            under_way[pool.submit(self.build, task)] = number, task
            if len(under_way) >= num_threads:
                collect(wait(under_way, return_when=FIRST_COMPLETED).done)
            if errors:
                break
        collect(wait(under_way).done)
        if errors:
            raise errors[min(errors)]
        return held


@contextlib.contextmanager
def _own_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file for `path` that no other thread or machine opens; needs no locks."""
    name = f"{path}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}{UNFINISHED}"
    try:
        with open(name, "wb") as file:
            yield file
    finally:
        Path(name).unlink(missing_ok=True)
