"""The folder of --checkpoint-dir: which checkpoints it has, how one appears and how one goes.

    lock                       held by the run that writes here
    vocabulary.bin             the categories of the tables' rows, for all checkpoints
    000007-step-20480/         a checkpoint: the seventh save, after 20480 steps
    000008-step-40960.partial/ one that is being written
    000006-step-10240.removed/ one that is being removed
    000005-step-8192.damaged/  one whose damage a resumed run has found

A checkpoint appears by one rename, when all its files are on the disk. The newest one has the
highest number: no file's time is looked at, as clocks may be set back.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from checkpoints.index import INDEX, Index
from checkpoints.json_values import readable
from checkpoints.shard_file import FilesToSync, write_all
from common.errors import UserError
from common.file_locks import means_no_locks
from common.whole_files import sync_folder
from criteo.vocabulary import VocabularySource

FLAG = "--checkpoint-dir"
_NAME = re.compile(r"(\d{6,})-step-(\d+)")
VOCABULARY = "vocabulary.bin"
PARTIAL, REMOVED, DAMAGED = ".partial", ".removed", ".damaged"


@dataclass(frozen=True)
class Found:
    """A checkpoint in a folder.

    Attributes:
        path: its folder.
        number: which save of its runs it was, from 1.
        step: training steps done, over all epochs.
    """

    path: Path
    number: int
    step: int


class CheckpointFolder:
    """A folder of checkpoints, of one run at a time.

    Args:
        path: where it is; it need not exist before `opened`.
        keep: checkpoints that stay; older ones are removed.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self._keep = path, keep

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder if it is missing, keep other runs out, and clear what a killed run left.

        Raises:
            UserError: it cannot be made or written, or another run writes there.
        """
        with contextlib.ExitStack() as stack:
            try:
                make_folder(self.path)
                lock = stack.enter_context(_opened_lock(self.path / "lock"))
                self._take(lock)
                self._sweep()
                self._check_writable()
            except OSError as error:
                raise UserError(
                    f"{FLAG}={self.path}: cannot write there ({error.strerror or error}):"
                    " name a folder that this user may write, on a disk with room"
                ) from error
            yield

    def _take(self, lock: IO[bytes]) -> None:
        """Lock the file, whose lock ends with this process and is not a forked child's.

        Raises:
            UserError: another process holds it.
            OSError: it cannot be written.
        """
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not means_no_locks(error):
                who = lock.read(200).decode(errors="replace").strip()
                raise UserError(
                    f"{FLAG}={self.path} is in use by another run"
                    f" ({readable(who) or 'an unknown process'}):"
                    " wait for it, or name another folder"
                ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _check_writable(self) -> None:
        """Raise an OSError if no folder can be made there: the lock may be from better days."""
        partial = self.begin(0)
        partial.rmdir()

    def _sweep(self) -> None:
        for path in self.path.iterdir():
            if path.suffix in (PARTIAL, REMOVED) and _NAME.fullmatch(path.stem):
                shutil.rmtree(path, ignore_errors=True)

    def checkpoints(self) -> list[Found]:
        """The checkpoints that are complete, as far as their names tell: the newest first."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in self.path.iterdir():
                name = _NAME.fullmatch(path.name)
                if name and path.is_dir():
                    found.append(Found(path, int(name[1]), int(name[2])))
        return sorted(found, key=lambda one: (one.number, one.step), reverse=True)

    def begin(self, step: int) -> Path:
        """Make the folder in which the next checkpoint is written.

        Args:
            step: training steps done.

        Raises:
            OSError: it cannot be made.
        """
        numbers = [found.number for found in self.checkpoints()]
        name = f"{max(numbers, default=0) + 1:06d}-step-{step}"
        partial = self.path / (name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return partial

    def publish(self, partial: Path, index: Index) -> Path:
        """Write the index, give the checkpoint its name, and remove the oldest ones.

        Args:
            partial: what `begin` returned; its files are complete and synced.
            index: what they hold.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: it could not be done; what was there before is kept.
        """
        with FilesToSync() as files:
            write_all(files.create(partial / INDEX), index.to_text().encode())
        sync_folder(partial)
        final = partial.with_suffix("")
        os.rename(partial, final)
        sync_folder(self.path)
        for old in self.checkpoints()[self._keep :]:
            remove(old.path)
        return final

    def check_space(self, num_bytes: int) -> None:
        """Raise a UserError if the disk lacks room for the checkpoints that will be kept.

        Args:
            num_bytes: size of one.
        """
        there = sum(_size_of(found.path) for found in self.checkpoints())
        # one more than are kept: the oldest goes when the newest is complete
        wanted = max((self._keep + 1) * num_bytes - there, num_bytes)
        free = shutil.disk_usage(self.path).free
        if wanted > free:
            raise UserError(
                f"{FLAG}={self.path}: {self._keep} checkpoints and one being written need"
                f" {wanted / 1e9:.3g} GB more, the disk has {free / 1e9:.3g} GB free:"
                " free some, lower --keep or name another folder"
            )

    def keep_vocabulary(self, vocabulary: VocabularySource) -> None:
        """Keep the categories of the tables' rows, which a model file made of a checkpoint needs.

        Raises:
            UserError: they cannot be written.
        """
        path = self.path / VOCABULARY
        try:
            vocabulary.write_beside(path)
        except OSError as error:
            raise UserError(
                f"{FLAG}={self.path}: cannot write {path} ({error.strerror or error}):"
                " free some space, or name another folder"
            ) from error


def make_folder(path: Path) -> None:
    """Make a folder, and have the disk keep its name and those of the folders above it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # who may write there may not be able to read
            sync_folder(folder.parent)


def _opened_lock(path: Path) -> IO[bytes]:
    """The file that is locked, which a link must not make another file: it is written anew."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"{path.name} is no regular file")
    return open(file, "r+b", buffering=0)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more; returns its new path."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


def remove(path: Path) -> None:
    """Remove a checkpoint; the rename makes it vanish at once."""
    removed = path.with_name(path.name + REMOVED)
    with contextlib.suppress(OSError):  # it is in nobody's way; the next run removes it
        os.rename(path, removed)
        shutil.rmtree(removed)


def _size_of(path: Path) -> int:
    sizes = 0
    with contextlib.suppress(OSError):
        sizes = sum(file.stat().st_size for file in path.iterdir())
    return sizes


def newest_in(path: Path) -> list[Found]:
    """The checkpoints that a path names, the newest first: itself, or those in the folder.

    Raises:
        UserError: it names none.
    """
    found, kind = [], "is no checkpoint, and has none in it"
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            kind = "is no folder"
        elif (path / INDEX).is_file():
            name = _NAME.fullmatch(os.path.basename(os.path.realpath(path)))
            numbers = (int(name[1]), int(name[2])) if name else (0, 0)
            return [Found(path, *numbers)]
        else:
            found = CheckpointFolder(path).checkpoints()
    except (FileNotFoundError, NotADirectoryError):
        kind = "is no folder"
    except OSError as error:
        kind = f"cannot be read ({error.strerror or error})"
    if not found:
        raise UserError(f"{path} {kind}: give the folder of a checkpoint or a {FLAG}")
    return found
