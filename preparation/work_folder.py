"""Finished pieces of a long job on disk: made once by whoever gets to it, checked when read.

A piece is a file of sections. It appears by a rename, so it is complete or absent, and it carries
the key of what it was made from, so one made of other files or flags counts as absent. Each section
has a checksum: what a crash, a disk or a stray write damaged is found when it is read, and made
again. That is why pieces are not synced to disk: only what lasts is.

Any number of threads, processes and machines may share a folder. Who makes a piece holds a lock on
the file that it will be renamed from; the system drops the lock of a process that dies. Where the
file system has no locks (`has_locks`) one process at a time is all that a folder can take.

    sections | meta (JSON) | index: an ENTRY a section | TRAILER | crc32 of these three
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from common.errors import RankError, UserError

TRAILER = struct.Struct("<8s16sQQL")  # mark, key, where meta is, sections, bytes of meta
ENTRY = np.dtype([("begin", "<u8"), ("size", "<u8"), ("checksum", "<u4")])  # of the index
CHECKSUM_BYTES = 4
MARK = b"DLRMwork"
LAST_PIECE = "published"  # after which the folder has done its service
TRIES = 5  # to make a piece that can be read
PAUSE = 0.05  # seconds between looks at pieces that others are making
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


Result = TypeVar("Result")


class DamagedError(Exception):
    """A piece is not there, or not as it was written."""


class FolderGoneError(Exception):
    """The folder is no more: somebody has finished the job."""


@dataclass(frozen=True)
class Crew:
    """Who works: this process among all that share the folder.

    Attributes:
        threads: of this process.
        rank: of this process, from 0.
        num_processes: that share the work.
    """

    threads: int = 1
    rank: int = 0
    num_processes: int = 1


class Writer:
    """Takes the sections of a piece, in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._index: list[tuple[int, int, int]] = []
        self._size = 0

    def section(self, buffers: Iterable[Any]) -> None:
        """Append a section: what the buffers hold, one after the other."""
        begin, checksum = self._size, _first_checksum(len(self._index))
        for buffer in buffers:
            view = memoryview(buffer).cast("B") if len(buffer) else b""
            checksum = zlib.crc32(view, checksum)
            self._file.write(view)
            self._size += len(view)
        self._index.append((begin, self._size - begin, checksum))

    def finish(self, key: str, meta: dict[str, Any]) -> None:
        """Append meta, index and trailer."""
        text = json.dumps(meta).encode()
        end = text + np.array(self._index, ENTRY).tobytes()
        end += TRAILER.pack(MARK, bytes.fromhex(key), self._size, len(self._index), len(text))
        self._file.write(end + zlib.crc32(end).to_bytes(4, "little"))
        self._file.flush()


def _first_checksum(number: int) -> int:
    """What the checksum of a section begins with: so none is 0, and no two are exchanged."""
    return number + 1


Make = Callable[[Writer], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """How to make a piece.

    Attributes:
        name: of its file, in the folder.
        key: of what it is made from; see `key_of`.
        make: writes its sections and gives its meta.
        size: how much work it is, in the unit of the progress bar.
    """

    name: str
    key: str
    make: Make
    size: int = 1


def key_of(*facts: Any) -> str:
    """32 hexadecimal digits that tell whether facts (what JSON takes) are the same."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class WorkFolder:
    """The pieces in a folder. `built` holds the names of those that this process made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.built: set[str] = set()

    @contextlib.contextmanager
    def joined(self, key: str, stages: Sequence[str]) -> Iterator[None]:
        """Make the folder and be one of those who work in it, all for the same result.

        The last one to leave removes it, where nothing in it is finished, or LAST_PIECE is.

        Args:
            key: of the result.
            stages: folders in it that pieces lie in.

        Raises:
            UserError: others are at work there for another result.
        """
        self._sweep()
        with self._enter(key, stages) as present:
            try:
                yield
            finally:
                self._leave(present, stages)

    @contextlib.contextmanager
    def _alone_at_the_door(self) -> Iterator[None]:
        """One process at a time comes, goes, or removes the folder."""
        with open(self.path / "door", "ab") as door:
            with contextlib.suppress(OSError):  # without locks nobody can tell
                fcntl.flock(door, fcntl.LOCK_EX)
            if not _is_still(door, door.name):
                raise FileNotFoundError(door.name)
            yield

    def _enter(self, key: str, stages: Sequence[str]) -> IO[bytes]:
        """The file that says what all are here for, locked by each of them."""
        while True:
            if os.path.lexists(self.path) and not self.path.is_dir():
                raise UserError(f"{self.path} is no folder: remove it")
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # just removed
                self.path.mkdir(exist_ok=True)
                with self._alone_at_the_door():
                    return self._agree(key, stages)

    def _agree(self, key: str, stages: Sequence[str]) -> IO[bytes]:
        for name in stages:
            (self.path / name).mkdir(exist_ok=True)
        present = open(self.path / "key", "a+b")  # noqa: SIM115
        present.seek(0)
        if present.read() != key.encode():
            if not _lock(present, fcntl.LOCK_EX):
                present.close()
                raise UserError(
                    f"another run prepares {self.path} with other flags or files:"
                    " wait for it, or name another --processed-data-file",
                )
            (self.path / LAST_PIECE).unlink(missing_ok=True)  # which is of another result
            present.truncate(0)
            present.write(key.encode())
            present.flush()
        _lock(present, fcntl.LOCK_SH)
        return present

    def _leave(self, present: IO[bytes], stages: Sequence[str]) -> None:
        """Take the folder along, where nobody stays and it is of no more use."""
        with contextlib.suppress(FileNotFoundError), self._alone_at_the_door():
            is_over = (self.path / LAST_PIECE).exists() or not self._has_any(stages)
            if is_over and _lock(present, fcntl.LOCK_EX):
                self.remove()
            _lock(present, fcntl.LOCK_UN)  # here, so that the next one to leave sees it

    def _has_any(self, stages: Sequence[str]) -> bool:
        """Is any piece finished?"""
        pieces = [path for name in stages for path in (self.path / name).glob("*")]
        return any(path.suffix != ".new" for path in pieces)

    def remove_if_idle(self) -> None:
        """Remove the folder, if it is there and nobody is at work in it."""
        self._sweep()
        if not self.path.is_dir():
            return
        with (
            contextlib.suppress(FileNotFoundError),
            self._alone_at_the_door(),
            open(self.path / "key", "ab") as present,
        ):
            if _lock(present, fcntl.LOCK_EX):
                self.remove()

    def remove(self) -> None:
        """Remove the folder and all that is in it; for all others it is gone at once."""
        name = f"{self.path.name}.{os.getpid()}.{threading.get_ident()}.removed"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, self.path.with_name(name))
        self._sweep()

    def _sweep(self) -> None:
        """Unlink what was removed, perhaps by a process that was killed meanwhile."""
        for path in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.removed"):
            shutil.rmtree(path, ignore_errors=True)

    def has(self, task: Task) -> bool:
        """Is the piece there? (Whether it is intact turns out when it is read.)"""
        try:
            with self._open(task) as file:
                self._trailer(file, task)
        except DamagedError:
            return False
        return True

    def meta(self, task: Task) -> dict[str, Any]:
        """What `make` gave.

        Raises:
            DamagedError: the piece is not there or not intact.
        """
        text, _ = self._end(task)
        found: dict[str, Any] = json.loads(text)
        return found

    def section_sizes(self, task: Task) -> Any:
        """Bytes of each section; `DamagedError` as for `meta`."""
        _, index = self._end(task)
        return np.frombuffer(index, ENTRY)["size"].astype(np.int64)

    def section(self, task: Task, number: int) -> bytes:
        """The bytes of a section; `DamagedError` as for `meta`."""
        with self._open(task) as file:
            at, sections, size = self._trailer(file, task)
            place = at + size + ENTRY.itemsize * number
            entry = os.pread(file.fileno(), ENTRY.itemsize, place)
            if number >= sections or len(entry) < ENTRY.itemsize:
                raise DamagedError(task.name)
            begin, size, checksum = (int(value) for value in np.frombuffer(entry, ENTRY)[0])
            content = os.pread(file.fileno(), size, begin) if begin + size <= at else b""
        if len(content) != size or zlib.crc32(content, _first_checksum(number)) != checksum:
            raise DamagedError(task.name)
        return content

    def intact(
        self, read: Callable[[Task], Result], task: Task, maker: Task | None = None
    ) -> Result:
        """What `read` gives of a piece; where it is damaged or missing it is made again.

        Args:
            read: `meta`, `section` or the like: raises DamagedError.
            task: of the piece.
            maker: the task that makes it, if that is another one.
        """
        for _ in range(TRIES):
            try:
                return read(task)
            except DamagedError:
                while not self._discard_if_damaged(read, task):
                    time.sleep(PAUSE)
                if maker is not None:
                    self.discard(maker)
                self.ensure(maker or task)
        raise RankError(f"{self.path / task.name} is damaged whenever it is made: check the disk")

    def _discard_if_damaged(self, read: Callable[[Task], Any], task: Task) -> bool:
        """Others may find the same damage, and have mended it; False where one is at it."""
        with self._claim(self.path / task.name) as file:
            if file is None:
                return False
            with contextlib.suppress(DamagedError):
                read(task)
                return True
            self.discard(task)
        return True

    def discard(self, task: Task) -> None:
        """Remove a piece, if it is there."""
        (self.path / task.name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open(self, task: Task) -> Iterator[IO[bytes]]:
        try:
            file = open(self.path / task.name, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise DamagedError(task.name) from None
        with file:
            yield file

    def _trailer(self, file: IO[bytes], task: Task) -> tuple[int, int, int]:
        """(where meta is, sections, bytes of meta)."""
        size, begin = os.fstat(file.fileno()).st_size, TRAILER.size + CHECKSUM_BYTES
        found = os.pread(file.fileno(), TRAILER.size, max(size - begin, 0))
        if size < begin:
            raise DamagedError(task.name)
        mark, key, at, sections, bytes_of_meta = TRAILER.unpack(found)
        whole = at + bytes_of_meta + ENTRY.itemsize * sections + begin
        if (mark, key, whole) != (MARK, bytes.fromhex(task.key), size):
            raise DamagedError(task.name)
        return at, sections, bytes_of_meta

    def _end(self, task: Task) -> tuple[bytes, bytes]:
        """Meta and index."""
        with self._open(task) as file:
            at, sections, size = self._trailer(file, task)
            file.seek(at)
            end = file.read()
        content, checksum = end[:-CHECKSUM_BYTES], end[-CHECKSUM_BYTES:]
        if zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") != checksum:
            raise DamagedError(task.name)
        return content[:size], content[size : size + ENTRY.itemsize * sections]

    def build(self, task: Task) -> bool:
        """Make the piece if it is not there; False where somebody else is making it."""
        path = self.path / task.name
        with self._claim(path) as file:
            if file is None:
                return False
            if not self.has(task):
                file.truncate(0)
                writer = Writer(file)
                writer.finish(task.key, task.make(writer))
                os.rename(file.name, path)
                self.built.add(task.name)
        return True

    def ensure(self, task: Task) -> None:
        """Make the piece if it is not there, or wait for who makes it."""
        while not self.build(task):
            time.sleep(PAUSE)

    @contextlib.contextmanager
    def _claim(self, path: Path) -> Iterator[IO[bytes] | None]:
        """An unnamed-to-be file to write the piece to, or None where another one holds it."""
        name = f"{path}.new"
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
                if error.errno not in _NO_LOCKS:
                    raise
                with self._own_file(path) as own:
                    yield own
                return
            if not _is_still(file, name):  # its maker renamed it while we opened it
                yield None
                return
            try:
                yield file
            finally:
                if _is_still(file, name):
                    os.unlink(name)

    @contextlib.contextmanager
    def _own_file(self, path: Path) -> Iterator[IO[bytes]]:
        """Where there are no locks: a file of a name that nobody else takes."""
        name = f"{path}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.new"
        try:
            with open(name, "wb") as file:
                yield file
        finally:
            Path(name).unlink(missing_ok=True)

    def run(self, tasks: Sequence[Task], crew: Crew, done: Callable[[Task], None]) -> None:
        """Have all pieces made, by this process and whoever shares the folder.

        Args:
            tasks: what to make.
            crew: this process begins at its share of them, so that few meet.
            done: called for each piece that is there.

        Raises:
            The error of the first task that fails; those under way are finished before.
        """
        first = len(tasks) * crew.rank // crew.num_processes
        waiting = [*range(first, len(tasks)), *range(first)]
        with ThreadPoolExecutor(crew.threads) as pool:
            while waiting:
                held = self._round([(k, tasks[k]) for k in waiting], pool, crew.threads, done)
                if len(held) == len(waiting):
                    time.sleep(PAUSE)
                waiting = held

    def _round(
        self,
        tasks: Sequence[tuple[int, Task]],
        pool: ThreadPoolExecutor,
        most: int,
        done: Callable[[Task], None],
    ) -> list[int]:
        """Try each task once; gives those that others hold."""
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
            if len(under_way) >= most:
                collect(wait(under_way, return_when=FIRST_COMPLETED).done)
            if errors:
                break
        collect(wait(under_way).done)
        if errors:
            raise errors[min(errors)]
        return held


def has_locks(folder: Path) -> bool:
    """Does its file system have locks? Tried on a file without a name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
    return True


def _lock(file: IO[bytes], kind: int) -> bool:
    """Take the lock, or change to it, if nobody's is in the way; without locks nobody's is."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_still(file: IO[bytes], name: str) -> bool:
    """Is `file` what stands there under that name?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False
