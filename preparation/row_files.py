"""The three files of rows that training reads: train.bin, test.bin, val.bin."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from criteo.columns import Bytes
from criteo.row_layout import Layout

SMALLEST_BUCKET, LARGEST_BUCKET = 16 << 20, 256 << 20  # bytes
BUCKETS_WANTED = 256  # where the rows are too many for the smallest, too few for the largest


@dataclass(frozen=True)
class RowFiles:
    """The three files of rows, and which rows go where.

    Attributes:
        folder: of the files.
        layout: of a row.
        order: of the training rows: file, day (shuffled within each part) or total.
        seed: of the shuffle.
        rows_per_part: the last part is for evaluation: its first half is test, the rest val.
    """

    folder: Path
    layout: Layout
    order: str
    seed: int
    rows_per_part: tuple[int, ...]

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each file."""
        evaluation = self.rows_per_part[-1]
        test = (evaluation + 1) // 2
        return {"train": sum(self.rows_per_part[:-1]), "test": test, "val": evaluation - test}

    @cached_property
    def groups(self) -> list[int]:
        """Rows of each group of rows that are shuffled together."""
        train = list(self.rows_per_part[:-1])
        return {"file": [], "day": train, "total": [sum(train)]}[self.order]

    def group(self, part: int) -> int:
        """The part's group; -1: its rows keep their order."""
        if self.order == "file" or part == len(self.rows_per_part) - 1:
            return -1
        return 0 if self.order == "total" else part

    def num_buckets(self, group: int) -> int:
        """Of a group: decided by its size alone."""
        size = self.groups[group] * self.layout.row_bytes
        bucket = min(max(size // BUCKETS_WANTED, SMALLEST_BUCKET), LARGEST_BUCKET)
        return int(-(-size // bucket)) or 1

    @property
    def bucket_bytes(self) -> int:
        """Bytes of the largest buckets, about."""
        sizes = [rows / self.num_buckets(g) for g, rows in enumerate(self.groups)]
        return int(max(sizes, default=0) * self.layout.row_bytes)

    def make_files(self) -> None:
        """The files at their full size, if they are not there."""
        self.folder.mkdir(exist_ok=True)
        for split, rows in self.rows.items():
            with open(self.folder / f"{split}.bin", "ab") as file:
                if file.tell() != rows * self.layout.row_bytes:
                    file.truncate(rows * self.layout.row_bytes)

    def write(self, split: str, row: int, rows: Bytes) -> list[Any]:
        """Write rows (n, row_bytes) from row `row` on; gives what `is_intact` takes."""
        view, at = memoryview(np.ascontiguousarray(rows).reshape(-1)), 0  # type: ignore[arg-type]
        begin = row * self.layout.row_bytes
        descriptor = os.open(self.folder / f"{split}.bin", os.O_WRONLY)
        try:
            while at < len(view):
                at += os.pwrite(descriptor, view[at:], begin + at)
        finally:
            os.close(descriptor)
        return [split, begin, len(view), zlib.crc32(view)]

    def is_intact(self, written: Sequence[Any]) -> bool:
        """Does the file still hold what `write` wrote there?"""
        split, begin, size, checksum = written
        with open(self.folder / f"{split}.bin", "rb") as file:
            file.seek(begin)
            found = 0
            while size > 0 and (content := file.read(min(size, SMALLEST_BUCKET))):
                found, size = zlib.crc32(content, found), size - len(content)
        return size == 0 and found == checksum

    def sync(self) -> None:
        """Have the disk hold what was written."""
        for split in self.rows:
            with open(self.folder / f"{split}.bin", "rb") as file:
                os.fsync(file.fileno())
