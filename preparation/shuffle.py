"""Rows to their places in train.bin, test.bin and val.bin; shuffles more than memory holds.

Two passes (Sanders, "Random permutations on distributed, external and hierarchical memory", 1998):
`scatter` sends each row of a piece to a random bucket, `gather` permutes each bucket, so each order
of all rows is equally likely. Rows that keep their order go to their place in the first pass. What
is drawn depends on the seed, on the piece's first row and on the bucket, not on who does it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled
from criteo.columns import Bytes
from criteo.row_layout import Layout
from preparation import row_files
from preparation.row_files import BUCKETS_WANTED, RowFiles
from preparation.work_folder import Task, WorkFolder, Writer, key_of

ROWS_AT_A_TIME = 1 << 16  # of a bucket, permuted and written
SCATTER, GATHER = 1, 2  # tell the generators of both passes apart

Run = tuple[int, int]  # (part, rows)
Ints = npt.NDArray[np.int64]


@compiled
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
class PieceRows:
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
        target: RowFiles,
        runs: Sequence[Sequence[Run]],
        read: Callable[[int], PieceRows],
        key: str,
    ) -> None:
        self._folder, self._target, self._runs, self._read = folder, target, runs, read
        self._key = key_of(key, target.order, target.seed, target.layout.columns, BUCKETS_WANTED,
                           row_files.SMALLEST_BUCKET, row_files.LARGEST_BUCKET)  # fmt: skip
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
