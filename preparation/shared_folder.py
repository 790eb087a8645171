"""Who is at work in a folder that processes and machines share: join it, leave it, remove it.

Everybody in the folder works for the same result and holds a shared lock on the file `key`, which
names that result. Coming, going and removing happen one process at a time, under a lock on the file
`door`. The system drops the locks of a process that dies.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.file_locks import means_no_locks

LAST_FILE = "published"  # once it is there, nobody needs the folder any more
UNFINISHED = ".new"  # suffix of a file that is still being written


class FolderGoneError(Exception):
    """The folder was removed: somebody has finished the job."""


class SharedFolder:
    """A folder whose users agree on one result.

    Args:
        path: where the folder is.
        stages: names of the folders in it that hold finished files.
    """

    def __init__(self, path: Path, stages: Sequence[str] = ()) -> None:
        self._path, self._stages = path, stages

    @contextlib.contextmanager
    def joined(self, key: str) -> Iterator[None]:
        """Make the folder if it is missing and join all others who work for that result there.

        The last one to leave removes the folder if it holds LAST_FILE or no finished file at all.

        Args:
            key: the key of the result; see checked_file.key_of.

        Raises:
            UserError: others work there for another result.
        """
        self._sweep()
        with self._enter(key) as key_file:
            try:
                yield
            finally:
                self._leave(key_file)

    def remove_if_idle(self) -> None:
        """Remove the folder if it is there and nobody works in it."""
        self._sweep()
        if not self._path.is_dir():
            return
        with (
            contextlib.suppress(FileNotFoundError),
            self._alone_at_the_door(),
            open(self._path / "key", "ab") as key_file,
        ):
            if try_lock(key_file, fcntl.LOCK_EX):
                self.remove()

    def remove(self) -> None:
        """Remove the folder and everything in it; the rename makes it vanish for all at once."""
        name = f"{self._path.name}.{os.getpid()}.{threading.get_ident()}.removed"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, self._path.with_name(name))
        self._sweep()

    def _sweep(self) -> None:
        """Delete renamed folders, also those of a process that was killed while it deleted one."""
        for path in self._path.parent.glob(f"{glob.escape(self._path.name)}.*.removed"):
            shutil.rmtree(path, ignore_errors=True)

    def _enter(self, key: str) -> IO[bytes]:
        """Make the folder and return its key file, locked."""
        while True:
            if os.path.lexists(self._path) and not self._path.is_dir():
                raise UserError(f"{self._path} is no folder: remove it")
            # the last one to leave may remove the folder at any point before the door is locked
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self._path.mkdir(exist_ok=True)
                with self._alone_at_the_door():
                    return self._agree(key)

    @contextlib.contextmanager
    def _alone_at_the_door(self) -> Iterator[None]:
        """Hold the door's lock, so that nobody else comes, goes or removes the folder.

        Raises:
            FileNotFoundError: the folder was removed before the lock was taken.
        """
        with open(self._path / "door", "ab") as door:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(door, fcntl.LOCK_EX)
            if not is_at_its_path(door):
                raise FileNotFoundError(door.name)
            yield

    def _agree(self, key: str) -> IO[bytes]:
        """Return the key file with a shared lock; write it if nobody else holds it."""
        for name in self._stages:
            folder = self._path / name
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"{folder} is no folder: remove {self._path}")
            folder.mkdir(exist_ok=True)
        key_file = open(self._path / "key", "a+b")  # noqa: SIM115
        key_file.seek(0)
        if key_file.read() != key.encode():
            if not try_lock(key_file, fcntl.LOCK_EX):
                key_file.close()
                raise UserError(
                    f"another run prepares {self._path} with other flags or files:"
                    " wait for it, or name another --processed-data-file"
                )
            (self._path / LAST_FILE).unlink(missing_ok=True)  # it tells of another result
            key_file.truncate(0)
            key_file.write(key.encode())
            key_file.flush()
        try_lock(key_file, fcntl.LOCK_SH)
        return key_file

    def _leave(self, key_file: IO[bytes]) -> None:
        """Unlock the key file; remove the folder if nobody stays and nothing in it is needed."""
        with contextlib.suppress(FileNotFoundError), self._alone_at_the_door():
            is_over = (self._path / LAST_FILE).exists() or not self._has_finished_files()
            if is_over and try_lock(key_file, fcntl.LOCK_EX):
                self.remove()
            # unlocked before the door opens: the next one to leave must see that this one is gone
            try_lock(key_file, fcntl.LOCK_UN)

    def _has_finished_files(self) -> bool:
        paths = [path for name in self._stages for path in (self._path / name).glob("*")]
        return any(path.suffix != UNFINISHED for path in paths)


def has_locks(folder: Path) -> bool:
    """True if the folder's file system has locks; a file without a name is tried."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not means_no_locks(error):
                raise
            return False
    return True


def try_lock(file: IO[bytes], kind: int) -> bool:
    """Take a lock, or change its kind, without waiting.

    Returns:
        False if somebody else's lock is in the way; always True if the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if not means_no_locks(error):
            raise
    return True


def is_at_its_path(file: IO[bytes]) -> bool:
    """True if the path that `file` was opened at still leads to it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False
