"""A file of tensors in the safetensors format, synced when it is written, checked when it is read.

The format (huggingface.co/docs/safetensors): eight bytes with the length of the header, the header
in JSON, the tensors' bytes. The library reads it. Its writer makes a second copy of the tensors and
holds Python's lock meanwhile, so that training beside it would stand still: the header is written
here, and the tensors straight from their memory.
"""

import contextlib
import importlib
import json
import os
import stat
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import PassingError
from common.versions import problem_of_import

MOST_BYTES = 64 << 20  # of a file's tensors, but a row is never cut: what a reader's buffer holds
BYTES_PER_WRITE = 16 << 20
MOST_UNSYNCED = 4  # files that the disk is still busy with
_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


class DamagedError(Exception):
    """A checkpoint's file is not what was written; the text begins with the file."""


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file that was written.

    Attributes:
        num_bytes: its size.
        crc32: checksum of its content.
    """

    num_bytes: int
    crc32: int


def problem_of_safetensors() -> str:
    """What is wrong with the library that reads the files; empty if nothing is."""
    return problem_of_import("safetensors", lambda: importlib.import_module("safetensors.torch"))


class FilesToSync:
    """Files that are written while the disk is still busy with those before.

    The block's end waits until the disk has all of them. If the block fails, they are closed only.
    """

    def __init__(self) -> None:
        self._open: deque[int] = deque()

    def __enter__(self) -> "FilesToSync":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._open and kind is None:
                self._sync_oldest()
        finally:
            for file in self._open:
                os.close(file)
            self._open.clear()

    def create(self, path: Path) -> int:
        """Open a new file to write to; waits for the disk if it is many files behind."""
        if len(self._open) >= MOST_UNSYNCED:
            self._sync_oldest()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._open.append(file)
        return file

    def _sync_oldest(self) -> None:
        """Wait for the disk; then the file leaves the system's cache to the training data."""
        os.fsync(self._open[0])
        with contextlib.suppress(OSError):  # a file system that keeps no cache
            os.posix_fadvise(self._open[0], 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._open.popleft())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], files: FilesToSync) -> FileFacts:
    """Write host tensors to a new file, which is synced with the others.

    Args:
        path: a name that is free.
        tensors: contiguous tensors on the CPU, by name.
        files: those that are synced together.

    Raises:
        OSError: the file cannot be written.
    """
    checksum, num_bytes = 0, 0
    file = files.create(path)
    for block in _blocks(tensors):
        checksum = zlib.crc32(block, checksum)
        num_bytes += len(block)
        write_all(file, block)
    return FileFacts(num_bytes, checksum)


def write_all(file: int, block: bytes | memoryview) -> None:
    """Write all bytes to an open file; the system may take them in pieces."""
    left = memoryview(block)
    while left:
        left = left[os.write(file, left) :]


def _blocks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for tensor in tensors.values():
        if tensor.numel():
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(content), BYTES_PER_WRITE):
                yield content[begin : begin + BYTES_PER_WRITE]


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def read_whole(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file: a device or a pipe in its place might never end.

    Raises:
        DamagedError: it is missing, something else or longer.
        PassingError: it cannot be read now.
    """
    try:
        size = _size_of(path)
        if size > most_bytes:
            raise DamagedError(f"{path} has {size} bytes, expected {most_bytes} at most")
        with path.open("rb") as file:
            return file.read(size)  # the system's own files have 0 bytes, and may block
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DamagedError | PassingError:
    """The error about a file that is missing, or that cannot be read now and may be whole."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DamagedError(f"{path}: {error.strerror or error}")
    return PassingError(
        f"{path}: cannot read it ({error.strerror or error}): the checkpoint may be whole;"
        " make the file readable, or go on from another one with --resume=PATH"
    )


def read_tensors(path: Path, facts: FileFacts) -> dict[str, torch.Tensor]:
    """The tensors of a file, which is read for its checksum and then mapped.

    Raises:
        DamagedError: it is missing, or another file than the one that was written.
        PassingError: it cannot be read now.
    """
    from safetensors import SafetensorError, safe_open

    checksum = 0
    for block in _blocks_of_file(path, facts.num_bytes):
        checksum = zlib.crc32(block, checksum)
    if checksum != facts.crc32:
        raise DamagedError(f"{path} has changed since it was written: its checksum is another one")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no safetensors file ({error})") from error


def _blocks_of_file(path: Path, num_bytes: int) -> Iterator[memoryview]:
    """The bytes of a regular file of that size, which lie where the next ones will lie.

    Raises:
        DamagedError: it is missing, something else or of another size.
        PassingError: it cannot be read now.
    """
    buffer = memoryview(bytearray(min(BYTES_PER_WRITE, max(num_bytes, 1))))
    try:
        if (size := _size_of(path)) != num_bytes:
            raise DamagedError(f"{path} has {size} bytes, {num_bytes} were written")
        with path.open("rb", buffering=0) as file:
            left = num_bytes
            while left and (found := file.readinto(buffer[: min(left, len(buffer))])):
                yield buffer[:found]
                left -= found
    except OSError as error:
        raise _unreadable(path, error) from error


def _size_of(path: Path) -> int:
    """The bytes of a regular file; a device or a pipe might never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{path} is no regular file")
    return found.st_size
