"""The vocabulary of prepared data on disk: which category has which id.

A file holds, for the columns C1 to C26 one after the other, the value of id 0, 1, 2, ... as
little-endian int32 (the signed number of the category's 32 bits), and nothing else. How many values
a column has, and the digest of all, are written elsewhere: in meta.json, in a model file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import UserError

VALUE_BYTES = 4
BLOCK_BYTES = 16 << 20  # bytes of a file that are in memory at a time

Ints = npt.NDArray[np.int32]


def begins_of(counts: Sequence[int]) -> list[int]:
    """The first entry of each column in a file that holds so many values of each."""
    begins: list[int] = np.cumsum([0, *counts[:-1]]).tolist()
    return begins


def digest_of(content: Path | Iterable[Any], counts: Sequence[int]) -> str:
    """32 hexadecimal digits: BLAKE2b over the 26 counts, as little-endian int64, and the bytes.

    Args:
        content: a file, or its bytes in blocks of any size.
        counts: number of values of each column.
    """
    digest = hashlib.blake2b(np.array(counts, "<i8").tobytes(), digest_size=16)
    for block in blocks_of(content) if isinstance(content, Path) else content:
        digest.update(block)
    return digest.hexdigest()


def blocks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, BLOCK_BYTES at a time."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def write_values(file: BinaryIO, blocks: Iterable[Any], counts: Sequence[int]) -> str:
    """Write the bytes of all columns, given as blocks, and return their digest."""

    def written() -> Iterator[Any]:
        for block in blocks:
            file.write(block)
            yield block

    return digest_of(written(), counts)


@dataclass(frozen=True)
class Vocabulary:
    """A file of values, and what it must hold.

    Attributes:
        path: where the file is.
        counts: number of values of each of the 26 columns.
        digest: what `digest_of` returns for it.
    """

    path: Path
    counts: tuple[int, ...]
    digest: str

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return VALUE_BYTES * sum(self.counts)

    def values(self, table: int) -> Ints:
        """(n,) int32, mapped read-only: the value of id 0, 1, 2, ... of a column from 0 to 25."""
        begin = VALUE_BYTES * begins_of(self.counts)[table]
        shape = (self.counts[table],)
        return np.asarray(np.memmap(self.path, "<i4", mode="r", offset=begin, shape=shape))

    def check(self) -> None:
        """Read the whole file once.

        Raises:
            UserError: the file is missing, or is another one than the digest was taken of.
        """
        what_to_do = "copy it again from the prepared data that it belongs to"
        if not self.path.is_file():
            reason = "is no file" if self.path.exists() else "is missing"
            raise UserError(f"{self.path} {reason}: {what_to_do}")
        if (size := self.path.stat().st_size) != self.num_bytes:
            got = f"expected {self.num_bytes} bytes, got {size}"
            raise UserError(f"{self.path} is damaged or another one ({got}): {what_to_do}")
        if (digest := digest_of(self.path, self.counts)) != self.digest:
            got = f"expected the digest {self.digest}, got {digest}"
            raise UserError(f"{self.path} is damaged or another one ({got}): {what_to_do}")
