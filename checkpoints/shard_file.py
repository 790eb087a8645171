"""A file of tensors in the safetensors format, synced when it is written, checked when it is read.

The format (huggingface.co/docs/safetensors): eight bytes with the length of the header, the header
in JSON, the tensors' bytes. The library reads it. Its writer makes a second copy of the tensors and
holds Python's lock meanwhile, so that training beside it would stand still: the header is written
here, and the tensors straight from their memory.
"""

import importlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.versions import problem_of_import

MOST_BYTES = 64 << 20  # of a file's tensors, but a row is never cut: what a reader's buffer holds
BYTES_PER_WRITE = 16 << 20
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileFacts:
    """Write host tensors to a new file, and have the disk keep it.

    Args:
        path: a name that is free.
        tensors: contiguous tensors on the CPU, by name.

    Raises:
        OSError: the file cannot be written.
    """
    checksum, num_bytes = 0, 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for block in _blocks(tensors):
            checksum = zlib.crc32(block, checksum)
            num_bytes += len(block)
            write_all(file, block)
        os.fsync(file)
    finally:
        os.close(file)
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
        DamagedError: it cannot be read, is something else or longer.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise DamagedError(f"{path} is no regular file")
        if facts.st_size > most_bytes:
            raise DamagedError(f"{path} has {facts.st_size} bytes, expected {most_bytes} at most")
        with path.open("rb") as file:
            return file.read(facts.st_size)  # the system's own files have 0 bytes, and may block
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror or error}") from error


def read_tensors(path: Path, facts: FileFacts) -> dict[str, torch.Tensor]:
    """The tensors of a file, which is read as a whole.

    Raises:
        DamagedError: it is missing, or another file than the one that was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_whole(path, facts.num_bytes)
    if len(content) != facts.num_bytes:
        raise DamagedError(f"{path} has {len(content)} bytes, {facts.num_bytes} were written")
    if zlib.crc32(content) != facts.crc32:
        raise DamagedError(f"{path} has changed since it was written: its checksum is another one")
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no safetensors file ({error})") from error
