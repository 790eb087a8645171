"""A file of sections that is checked when it is read: whole, undamaged and made for its key.

    sections | meta (JSON) | index: an ENTRY a section | TRAILER | crc32 of these three

The trailer names the key of what the file was made from, so a file made from other data or flags
counts as absent. Each section has a checksum. The reader therefore finds what a crash, a disk or a
stray write damaged, and these files need not be synced to disk.
"""

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

TRAILER = struct.Struct("<8s16sQQL")  # MARK, key, offset of the meta, num_sections, bytes of meta
ENTRY = np.dtype([("begin", "<u8"), ("size", "<u8"), ("checksum", "<u4")])
CHECKSUM_BYTES = 4
MARK = b"DLRMwork"


class DamagedError(Exception):
    """The file is missing, made from something else, or not as it was written."""


def key_of(*facts: Any) -> str:
    """32 hexadecimal digits that are the same for equal facts (anything that JSON takes)."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class Writer:
    """Writes the sections of a checked file, in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._index: list[tuple[int, int, int]] = []
        self._size = 0

    def section(self, buffers: Iterable[Any]) -> None:
        """Append a section: the bytes of the buffers, one after the other."""
        begin, checksum = self._size, _first_checksum(len(self._index))
        for buffer in buffers:
            view = memoryview(buffer).cast("B") if len(buffer) else b""
            checksum = zlib.crc32(view, checksum)
            self._file.write(view)
            self._size += len(view)
        self._index.append((begin, self._size - begin, checksum))

    def finish(self, key: str, meta: dict[str, Any]) -> None:
        """Append the meta (anything that JSON takes), the index and the trailer."""
        text = json.dumps(meta).encode()
        end = text + np.array(self._index, ENTRY).tobytes()
        end += TRAILER.pack(MARK, bytes.fromhex(key), self._size, len(self._index), len(text))
        self._file.write(end + zlib.crc32(end).to_bytes(CHECKSUM_BYTES, "little"))
        self._file.flush()


def _first_checksum(section: int) -> int:
    """Where a section's crc32 starts, so that no zeroed index entry or other section matches."""
    return section + 1


@dataclass(frozen=True)
class _Trailer:
    """The trailer's numbers; offsets and sizes in bytes."""

    meta_offset: int
    meta_size: int
    num_sections: int

    @property
    def index_offset(self) -> int:
        return self.meta_offset + self.meta_size

    @property
    def end(self) -> int:
        return self.index_offset + ENTRY.itemsize * self.num_sections + TRAILER.size


class CheckedFile:
    """Reads a file that a Writer wrote. All methods but `exists` raise DamagedError.

    Args:
        path: where the file is.
        key: the key that the file must have been finished with.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    def exists(self) -> bool:
        """True if a file of this key and of its full size is there; its bytes are not read."""
        try:
            with self._open() as file:
                self._trailer(file)
        except DamagedError:
            return False
        return True

    def meta(self) -> dict[str, Any]:
        """The meta that the file was finished with."""
        text, _ = self._meta_and_index()
        meta: dict[str, Any] = json.loads(text)
        return meta

    def section_sizes(self) -> npt.NDArray[np.int64]:
        """(sections,) number of bytes of each section."""
        _, index = self._meta_and_index()
        return np.frombuffer(index, ENTRY)["size"].astype(np.int64)

    def section(self, number: int) -> bytes:
        """The bytes of a section, counted from 0."""
        with self._open() as file:
            trailer = self._trailer(file)
            offset = trailer.index_offset + ENTRY.itemsize * number
            entry = os.pread(file.fileno(), ENTRY.itemsize, offset)
            if number >= trailer.num_sections or len(entry) < ENTRY.itemsize:
                raise DamagedError(self._path)
            begin, size, checksum = (int(value) for value in np.frombuffer(entry, ENTRY)[0])
            is_inside = begin + size <= trailer.meta_offset
            content = os.pread(file.fileno(), size, begin) if is_inside else b""
        if len(content) != size or zlib.crc32(content, _first_checksum(number)) != checksum:
            raise DamagedError(self._path)
        return content

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise DamagedError(self._path) from None
        with file:
            yield file

    def _trailer(self, file: IO[bytes]) -> _Trailer:
        size = os.fstat(file.fileno()).st_size
        offset = size - CHECKSUM_BYTES - TRAILER.size
        if offset < 0:
            raise DamagedError(self._path)
        found = TRAILER.unpack(os.pread(file.fileno(), TRAILER.size, offset))
        mark, key, meta_offset, num_sections, meta_size = found
        trailer = _Trailer(meta_offset, meta_size, num_sections)
        wanted = (MARK, bytes.fromhex(self._key), size)
        if (mark, key, trailer.end + CHECKSUM_BYTES) != wanted:
            raise DamagedError(self._path)
        return trailer

    def _meta_and_index(self) -> tuple[bytes, bytes]:
        with self._open() as file:
            trailer = self._trailer(file)
            file.seek(trailer.meta_offset)
            end = file.read()
        content, checksum = end[:-CHECKSUM_BYTES], end[-CHECKSUM_BYTES:]
        if zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") != checksum:
            raise DamagedError(self._path)
        index = content[trailer.meta_size : -TRAILER.size]
        return content[: trailer.meta_size], index
