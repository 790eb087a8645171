"""Rows to their places in train.bin, test.bin and val.bin; shuffles more than memory holds.

Two passes (Sanders, "Random permutations on distributed, external and hierarchical memory", 1998):
`scatter` sends each row of a piece to a random bucket, `gather` permutes each bucket, so each order
of all rows is equally likely. Rows that keep their order go to their place in the first pass. What
is drawn depends on the seed, on the piece's first row and on the bucket, not on who does it.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from criteo_text import Bytes
from row_layout import Layout
from work_folder import Task, WorkFolder, Writer, key_of

SMALLEST_BUCKET, LARGEST_BUCKET = 16 << 20, 256 << 20  # bytes
BUCKETS_WANTED = 256  # where the rows are too many for the smallest, too few for the largest
ROWS_AT_A_TIME = 1 << 16  # of a bucket, permuted and written
SCATTER, GATHER = 1, 2  # tell the generators of both passes apart

Run = tuple[int, int]  # (part, rows)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Target:
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


@njit(nogil=True, cache=True)
def _places(bucket: Any, ends: Any) -> Any:
    """Where each row goes, so that rows lie bucket by bucket; ends[b] becomes bucket b's end."""
    for b in bucket:
        ends[b] += 1
    begins = np.zeros(len(ends), np.int64)
    for b in range(1, len(ends)):
        begins[b] = ends[b - 1]
        ends[b] += ends[b - 1]
    places = np.empty(len(bucket), np.int64)
    for i in range(len(bucket)):
        places[i] = begins[bucket[i]]
        begins[bucket[i]] += 1
    return places


@dataclass(frozen=True)
class Encoded:
    """A piece on its way: rows in their own layout, and what their categories become."""

    rows: Bytes
    layout: Layout
    ids: list[Any] | None


class Shuffle:
    """The tasks of both passes.

    Args:
        folder: where pieces lie.
        target: where rows go.
        runs: of each piece: parts and their rows, in the order of its rows.
        read: gives a piece's rows by its number.
        key: of all that `read` gives.
    """

    def __init__(
        self,
        folder: WorkFolder,
        target: Target,
        runs: Sequence[Sequence[Run]],
        read: Callable[[int], Encoded],
        key: str,
    ) -> None:
        self._folder, self._target, self._runs, self._read = folder, target, runs, read
        self._key = key_of(key, target.order, target.seed, target.layout.columns, BUCKETS_WANTED,
                           SMALLEST_BUCKET, LARGEST_BUCKET)  # fmt: skip
        self._first_rows = self._find_first_rows()
        self.scatter_tasks = self._make_scatter_tasks()
        self._sections = [self._find_sections(group) for group in range(len(target.groups))]

    def _find_first_rows(self) -> list[list[int]]:
        """Of each run of each piece: its first row among those of its part."""
        seen = [0] * len(self._target.rows_per_part)
        first_rows: list[list[int]] = []
        for runs in self._runs:
            first_rows.append([])
            for part, rows in runs:
                first_rows[-1].append(seen[part])
                seen[part] += rows
        return first_rows

    # ------------------------------------------------------------ first pass

    def _make_scatter_tasks(self) -> list[Task]:
        """A task a piece: a section for each bucket of each of its runs that is shuffled."""
        row_bytes = self._target.layout.row_bytes
        return [
            Task(
                f"scattered/{k:06}",
                key_of(self._key, SCATTER, k),
                lambda writer, k=k: self._scatter(k, writer),
                row_bytes * sum(rows for _, rows in runs),
            )
            for k, runs in enumerate(self._runs)
        ]

    def _scatter(self, number: int, writer: Writer) -> dict[str, Any]:
        piece = self._read(number)
        written: list[Any] = []
        begin = 0
        for k, (part, count) in enumerate(self._runs[number]):
            rows = piece.rows[begin : begin + count]
            begin += count
            group, row = self._target.group(part), self._first_rows[number][k]
            if group < 0:
                repacked = piece.layout.repack(
                    rows, piece.ids, self._target.layout, np.arange(count)
                )
                written += self._write_in_order(part, row, repacked)
                continue
            num_buckets = self._target.num_buckets(group)
            random = np.random.default_rng([self._target.seed, SCATTER, part, row])
            ends = np.zeros(num_buckets, np.int64)
            places = _places(random.integers(0, num_buckets, count), ends)
            repacked = piece.layout.repack(rows, piece.ids, self._target.layout, places)
            for bucket in np.split(repacked, ends[:-1]):
                writer.section([bucket])
        return {"written": written}

    def _write_in_order(self, part: int, row: int, rows: Bytes) -> list[Any]:
        """Rows of a part from its row `row` on, to where they stay."""
        target = self._target
        if part < len(target.rows_per_part) - 1:
            return [target.write("train", sum(target.rows_per_part[:part]) + row, rows)]
        num_test = target.rows["test"]
        cut = min(max(num_test - row, 0), len(rows))
        return [
            target.write("test", min(row, num_test), rows[:cut]),
            target.write("val", max(row - num_test, 0), rows[cut:]),
        ]

    # ------------------------------------------------------------ second pass

    def gather_tasks(self) -> list[Task]:
        """A task a bucket, once the first pass is done."""
        tasks = []
        for group in range(len(self._target.groups)):
            sizes = self._bucket_sizes(group)
            first = sum(self._target.groups[:group])
            for bucket, rows in enumerate(sizes):
                tasks.append(self._gather_task(group, bucket, first, int(rows)))
                first += int(rows)
        return tasks

    def _gather_task(self, group: int, bucket: int, first: int, rows: int) -> Task:
        return Task(
            f"gathered/{group:03}_{bucket:06}",
            key_of(self._key, GATHER, group, bucket),
            lambda _: self._gather(group, bucket, first, rows),
            self._target.layout.row_bytes * rows,
        )

    def _find_sections(self, group: int) -> list[tuple[int, int]]:
        """(piece, its first section for the group) of all runs of a group, in order."""
        found = []
        for number, runs in enumerate(self._runs):
            section = 0
            for part, _ in runs:
                its_group = self._target.group(part)
                if its_group == group:
                    found.append((number, section))
                section += self._target.num_buckets(its_group) if its_group >= 0 else 0
        return found

    def _bucket_sizes(self, group: int) -> Ints:
        """Rows of each bucket."""
        num_buckets = self._target.num_buckets(group)
        sizes = np.zeros(num_buckets, np.int64)
        for number, section in self._sections[group]:
            task = self.scatter_tasks[number]
            found = self._folder.intact(self._folder.section_sizes, task)
            sizes += found[section : section + num_buckets]
        return sizes // self._target.layout.row_bytes

    def _gather(self, group: int, bucket: int, first: int, num_rows: int) -> dict[str, Any]:
        tasks, width = self.scatter_tasks, self._target.layout.row_bytes
        rows, at = np.empty((num_rows, width), np.uint8), 0
        for number, section in self._sections[group]:
            content = self._folder.intact(
                lambda task, s=section: self._folder.section(task, s + bucket), tasks[number]
            )
            part = np.frombuffer(content, np.uint8).reshape(-1, width)
            rows[at : at + len(part)] = part
            at += len(part)
        assert at == num_rows
        random = np.random.default_rng([self._target.seed, GATHER, group, bucket])
        order = random.permutation(num_rows)
        written = []
        for begin in range(0, num_rows, ROWS_AT_A_TIME):
            chosen = rows[order[begin : begin + ROWS_AT_A_TIME]]
            written.append(self._target.write("train", first + begin, chosen))
        return {"written": written}

    # ------------------------------------------------------------ the end

    def make_whole(self, tasks: Sequence[Task]) -> None:
        """Read again what others wrote, or an earlier run, and write it again where it differs."""
        for task in tasks:
            if task.name in self._folder.built:
                continue
            written = self._folder.intact(self._folder.meta, task)["written"]
            if not all(self._target.is_intact(region) for region in written):
                self._folder.discard(task)
                self._folder.ensure(task)
