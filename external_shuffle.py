"""Shuffles more rows than memory holds, through files on disk."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from criteo_text import NUM_FIELDS, Rows

BUCKET_BYTES = 128 << 20  # rows that the shuffle holds in memory at a time
ROWS_AT_A_TIME = 1 << 16  # rows that the shuffle writes at a time
MAX_BUCKETS = 512  # files that the shuffle has open at a time


class ExternalShuffle:
    """Uniform shuffle of more rows than memory holds.

    Each row goes to a random bucket, each bucket is permuted (Sanders, "Random permutations on
    distributed, external and hierarchical memory", 1998).
    """

    def __init__(
        self, folder: Path, order: str, random: np.random.Generator, sizes: list[int]
    ) -> None:
        self._folder, self._order, self._random = folder, order, random
        self._sizes = sizes if order == "day" else [sum(sizes)] * len(sizes)
        self._part = 0
        self._buckets: list[BinaryIO] = []

    def write(self, part: int, rows: Rows, out: BinaryIO) -> None:
        """Take rows of a part, parts in order; what is complete goes to `out`."""
        if self._order == "file":
            out.write(rows.tobytes())
            return
        if self._order == "day" and part != self._part:
            self.finish(out)
        if not self._buckets:
            self._open(part)
        bucket = (self._random.random(len(rows)) * len(self._buckets)).astype(np.int64)
        by_bucket = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._buckets)))[:-1]
        for file, chosen in zip(self._buckets, np.split(by_bucket, ends), strict=True):
            file.write(rows[chosen].tobytes())

    def _open(self, part: int) -> None:
        self._part = part
        num_buckets = min(MAX_BUCKETS, self._sizes[part] // BUCKET_BYTES + 1)
        self._buckets = [
            open(self._folder / f"bucket_{k}", "w+b")  # noqa: SIM115 (finish closes it)
            for k in range(num_buckets)
        ]

    def finish(self, out: BinaryIO) -> None:
        """Append the buckets to `out`, each permuted, and remove them."""
        for file in self._buckets:
            file.seek(0)
            rows = np.frombuffer(file.read(), np.int32).reshape(-1, NUM_FIELDS)
            order = self._random.permutation(len(rows))
            for begin in range(0, len(rows), ROWS_AT_A_TIME):
                out.write(rows[order[begin : begin + ROWS_AT_A_TIME]].tobytes())
            file.close()
            os.unlink(file.name)
        self._buckets = []
