"""The three files of rows that training reads: train.bin, test.bin, val.bin."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from criteo.columns import Bytes
from criteo.row_layout import Layout
from preparation.sizes import DEFAULT_SIZES, Sizes

READ_BYTES = 16 << 20  # bytes that are checked at a time


@dataclass(frozen=True)
class RowFiles:
    """The three files of rows, and which rows each of them holds.

    Rows that are shuffled together form a group: all training rows, or those of a part.

    Attributes:
        folder: where the files are.
        layout: how a row is packed.
        order: how the training rows are ordered: file, day (shuffled within each part) or total.
        seed: decides the shuffle.
        rows_per_part: rows of each part. The last part is for evaluation: its first half is test,
            the rest val.
        sizes: how large buckets are.
    """

    folder: Path
    layout: Layout
    order: str
    seed: int
    rows_per_part: tuple[int, ...]
    sizes: Sizes = DEFAULT_SIZES

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each file."""
        evaluation = self.rows_per_part[-1]
        test = (evaluation + 1) // 2
        return {"train": sum(self.rows_per_part[:-1]), "test": test, "val": evaluation - test}

    @cached_property
    def group_rows(self) -> list[int]:
        """Number of rows of each group."""
        train = list(self.rows_per_part[:-1])
        return {"file": [], "day": train, "total": [sum(train)]}[self.order]

    def group(self, part: int) -> int:
        """The part's group; -1 if its rows keep their order."""
        if self.order == "file" or part == len(self.rows_per_part) - 1:
            return -1
        return 0 if self.order == "total" else part

    def num_buckets(self, group: int) -> int:
        """Number of buckets of a group, which depends on its size alone."""
        sizes, group_bytes = self.sizes, self.group_rows[group] * self.layout.row_bytes
        bucket = max(group_bytes // sizes.num_buckets, sizes.smallest_bucket)
        return int(-(-group_bytes // min(bucket, sizes.largest_bucket))) or 1

    @property
    def bucket_bytes(self) -> int:
        """Expected bytes of a bucket in the group that has the largest ones."""
        rows = [rows / self.num_buckets(group) for group, rows in enumerate(self.group_rows)]
        return int(max(rows, default=0) * self.layout.row_bytes)

    def make_files(self) -> None:
        """Make the files at their full size, unless they have it already."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder: remove {self.folder.parent}")
        self.folder.mkdir(exist_ok=True)
        for split, rows in self.rows.items():
            with open(self.folder / f"{split}.bin", "ab") as file:
                if file.tell() != rows * self.layout.row_bytes:
                    file.truncate(rows * self.layout.row_bytes)

    def write(self, split: str, first_row: int, rows: Bytes) -> list[Any]:
        """Write rows to their position in a file.

        Args:
            split: train, test or val.
            first_row: position of the first of the rows.
            rows: (n, bytes of a row).

        Returns:
            The receipt that `is_intact` takes: [split, first byte, bytes, crc32].
        """
        view, written = memoryview(np.ascontiguousarray(rows).reshape(-1)), 0  # type: ignore[arg-type]
        begin = first_row * self.layout.row_bytes
        descriptor = os.open(self.folder / f"{split}.bin", os.O_WRONLY)
        try:
            while written < len(view):
                written += os.pwrite(descriptor, view[written:], begin + written)
        finally:
            os.close(descriptor)
        return [split, begin, len(view), zlib.crc32(view)]

    def is_intact(self, receipt: Sequence[Any]) -> bool:
        """True if the file still holds the bytes that `write` returned this receipt for."""
        split, begin, size, checksum = receipt
        with open(self.folder / f"{split}.bin", "rb") as file:
            file.seek(begin)
            found = 0
            while size > 0 and (content := file.read(min(size, READ_BYTES))):
                found, size = zlib.crc32(content, found), size - len(content)
        return size == 0 and found == checksum

    def sync(self) -> None:
        """Make sure that the files' bytes are on the disk."""
        for split in self.rows:
            with open(self.folder / f"{split}.bin", "rb") as file:
                os.fsync(file.fileno())
