"""Criteo's raw files, plain or gzip: find them, and read their lines in bounded blocks."""

import contextlib
import glob
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import RankError, UserError

RAW_NAMES = {"kaggle": "train.txt", "terabyte": "day"}
BLOCK_BYTES = 4 << 20  # bytes of text that are in memory at a time
MAX_LINE_BYTES = 1 << 16  # no line of Criteo's is longer
HINT = "--data_path or --raw-data-file names the raw data"


class Lines:
    """The lines of a text from a byte on, in blocks of whole lines.

    A line belongs to the byte range that holds its first byte, so readers of consecutive ranges
    together read each line once.

    Args:
        file: the text, at its beginning.
        begin: the first byte of the range.
        block_bytes: size of a block, not counting the rest of its last line.
        max_line_bytes: a longer line may be cut, because a file of another kind may have no
            newline at all.

    Attributes:
        at: offset of the first byte that has not been read yet.
        is_at_end: whether a read has found the end of the text.
    """

    def __init__(
        self,
        file: IO[bytes],
        begin: int = 0,
        block_bytes: int = BLOCK_BYTES,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._file, self.at, self.is_at_end = file, begin, False
        self._block_bytes, self._max_line_bytes = block_bytes, max_line_bytes
        self._on_disk = getattr(file, "fileobj", file)
        if begin:
            file.seek(begin - 1)
            self.at = begin - 1 + len(file.readline(max_line_bytes))

    @property
    def packed(self) -> int:
        """Number of bytes read so far of the file on disk, which may be compressed."""
        return int(self._on_disk.tell())

    def blocks(self, end: int) -> Iterator[bytes]:
        """The next lines, up to the last one that begins before byte `end`.

        Every line ends in a newline, the last one of the file too.
        """
        while self.at < end:
            text = self._file.read(min(self._block_bytes, end - self.at))
            if text and not text.endswith(b"\n"):
                text += self._file.readline(self._max_line_bytes)
            self.at += len(text)
            if not text:
                self.is_at_end = True
                return
            yield text if text.endswith(b"\n") else text + b"\n"


@dataclass(frozen=True)
class RawFile:
    """A file of Criteo text, plain or gzip, with its size and time when the run began."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> "RawFile":
        """The file as it is now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    @property
    def is_gzip(self) -> bool:
        """Whether the file is unpacked while it is read."""
        return self.path.suffix == ".gz"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name, size and time, by which a later run tells whether the file is the same."""
        return {"name": self.path.name, "size": self.size, "mtime_ns": self.mtime_ns}

    @contextlib.contextmanager
    def lines(
        self,
        begin: int = 0,
        block_bytes: int = BLOCK_BYTES,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> Iterator[Lines]:
        """A context with the lines that begin at or after byte `begin` of the unpacked text.

        Raises:
            RankError: the file is truncated or damaged, or it changed while it was read.
        """
        try:
            with self._open() as file:
                yield Lines(file, begin, block_bytes, max_line_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RankError(
                f"{self.path} is truncated or damaged ({error}): fetch it again"
            ) from error
        self.check_unchanged()

    def _open(self) -> IO[bytes]:
        opened: Any = gzip.open(self.path) if self.is_gzip else open(self.path, "rb")  # noqa: SIM115
        file: IO[bytes] = opened
        return file

    def check_unchanged(self) -> None:
        """Raise a RankError if the file is no longer what it was."""
        if not self.path.is_file() or RawFile.at(self.path) != self:
            raise RankError(
                f"{self.path} changed while it was read: start again when it is complete"
            )

    def sample(self, size: int) -> tuple[bytes, float]:
        """(whole lines of about the first `size` bytes of text, bytes of text per byte of file)."""
        with open(self.path, "rb") as file:
            packed = file.read(size + MAX_LINE_BYTES)
        text, unpacked = packed, 1.0
        if self.is_gzip:
            text, unpacker = b"", zlib.decompressobj(wbits=31)
            with contextlib.suppress(zlib.error):  # reading the whole file reports it
                text = unpacker.decompress(packed)
                unpacked = len(text) / max(len(packed) - len(unpacker.unused_data), 1)
        end = text.find(b"\n", size) + 1
        return (text[:end] if end else text), unpacked


def find_raw_files(raw: Path, data_set: str) -> list[RawFile]:
    """The raw files in order: train.txt or the days, each plain or, if there is no plain one, .gz.

    Args:
        raw: train.txt, or the days' common name without _0, _1, ...
        data_set: kaggle or terabyte.

    Raises:
        UserError: a file is missing, unreadable or empty, a day is missing, or there are fewer
            than two days.
    """
    paths = [_plain_or_gzip(raw)] if data_set == "kaggle" else _find_days(raw)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: {what_is_at(path)}; {HINT}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: no permission to read it")
        if path.stat().st_size == 0:
            raise UserError(
                f"{path} is empty: expected lines of label, 13 integers, 26 hex strings"
            )
    return [RawFile.at(path) for path in paths]


def day_numbers(raw: Path) -> list[int]:
    """The numbers d of the files `<raw>_<d>` and `<raw>_<d>.gz`, ascending."""
    prefix = raw.name + "_"
    paths = raw.parent.glob(glob.escape(prefix) + "*")
    names = [path.name.removeprefix(prefix) for path in paths]
    names = [name.removesuffix(".gz") for name in names]
    return sorted({int(name) for name in names if name.isdecimal() and name == str(int(name))})


def printable(path: Path) -> str:
    """A path as text that can be printed: bytes of a name that are not text are shown as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def what_is_at(path: Path) -> str:
    """Why nothing can be read at a path where no regular file is."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"
    kinds = {
        "a folder": path.is_dir(),
        "a fifo": path.is_fifo(),
        "a socket": path.is_socket(),
        "a device": path.is_block_device() or path.is_char_device(),
    }
    found = [kind for kind, is_it in kinds.items() if is_it]
    return f"{found[0]}, expected a file" if found else "no such file"


def _plain_or_gzip(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.is_file() else path


def _find_days(raw: Path) -> list[Path]:
    days = day_numbers(raw)
    if not days:
        raise UserError(f"{raw}_0: no such file; {HINT}")
    there = set(days)  # the last number may be huge
    gaps = list(itertools.islice((day for day in range(days[-1]) if day not in there), 6))
    if gaps:
        missing = _names(raw, gaps)
        raise UserError(
            f"{raw.parent} lacks {missing} (it has {raw.name}_{days[-1]}): days are numbered from 0"
        )
    if len(days) < 2:
        raise UserError(
            f"{raw.parent} holds only {raw.name}_0: at least two days are needed, the last tests"
        )
    return [_plain_or_gzip(raw.with_name(f"{raw.name}_{day}")) for day in days]


def _names(raw: Path, days: Sequence[int]) -> str:
    return ", ".join(f"{raw.name}_{day}" for day in days[:5]) + (" ..." if len(days) > 5 else "")
