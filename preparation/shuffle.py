"""Writes rows to their positions in the files; shuffles more rows than fit into memory.

Two passes (Sanders, "Random permutations on distributed, external and hierarchical memory", 1998):
`scatter` sends each row of a piece to a random bucket, `gather` permutes each bucket. Each order of
all rows is then equally likely. Rows that keep their order are written in the first pass. The draws
depend on the seed, on the piece's first row and on the bucket, not on who does the work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled
from criteo.columns import Bytes
from preparation.checked_file import CheckedFile, Writer, key_of
from preparation.parsed_piece import Run
from preparation.piece_store import PieceRows
from preparation.row_files import RowFiles
from preparation.work_folder import Task, WorkFolder

SCATTER, GATHER = 1, 2  # part of the passes' seeds, so that their draws differ

Ints = npt.NDArray[np.int64]


@compiled
def _positions(buckets: Any, ends: Any) -> Any:
    """The position of each row if rows are sorted by bucket; ends[b] becomes bucket b's end."""
    for b in buckets:
        ends[b] += 1
    begins = np.zeros(len(ends), np.int64)
    for b in range(1, len(ends)):
        begins[b] = ends[b - 1]
        ends[b] += ends[b - 1]
    positions = np.empty(len(buckets), np.int64)
    for i in range(len(buckets)):
        positions[i] = begins[buckets[i]]
        begins[buckets[i]] += 1
    return positions


class Shuffle:
    """The tasks of both passes.

    Args:
        folder: the work folder that holds the tasks' files.
        files: the files that rows are written to.
        runs: for each piece its (part, number of rows), in the order of the piece's rows.
        read: takes a piece's number and returns its rows.
        key: the key of everything that `read` returns.

    Attributes:
        scatter_tasks: the tasks of the first pass, one for each piece.
    """

    def __init__(
        self,
        folder: WorkFolder,
        files: RowFiles,
        runs: Sequence[Sequence[Run]],
        read: Callable[[int], PieceRows],
        key: str,
    ) -> None:
        self._folder, self._files, self._runs, self._read = folder, files, runs, read
        num_buckets = [files.num_buckets(group) for group in range(len(files.group_rows))]
        self._key = key_of(key, files.order, files.seed, files.layout.columns, num_buckets)
        self._first_rows = self._find_first_rows()
        self.scatter_tasks = self._make_scatter_tasks()
        self._sections = [self._find_sections(group) for group in range(len(num_buckets))]

    def _find_first_rows(self) -> list[list[int]]:
        """For each run of each piece, the position of its first row among the rows of its part."""
        seen = [0] * len(self._files.rows_per_part)
        first_rows: list[list[int]] = []
        for runs in self._runs:
            first_rows.append([])
            for part, num_rows in runs:
                first_rows[-1].append(seen[part])
                seen[part] += num_rows
        return first_rows

    # ------------------------------------------------------------ first pass

    def _make_scatter_tasks(self) -> list[Task]:
        """A task for each piece; its file has a section for each bucket of each shuffled run."""
        row_bytes = self._files.layout.row_bytes
        return [
            Task(
                f"scattered/{piece:06}",
                key_of(self._key, SCATTER, piece),
                lambda writer, piece=piece: self._scatter(piece, writer),
                row_bytes * sum(num_rows for _, num_rows in runs),
            )
            for piece, runs in enumerate(self._runs)
        ]

    def _scatter(self, piece: int, writer: Writer) -> dict[str, Any]:
        taken, receipts, begin = self._read(piece), [], 0
        for (part, num_rows), first_row in zip(
            self._runs[piece], self._first_rows[piece], strict=True
        ):
            rows = PieceRows(taken.rows[begin : begin + num_rows], taken.layout, taken.ids)
            begin += num_rows
            if self._files.group(part) < 0:
                repacked = self._repack(rows, np.arange(num_rows))
                receipts += self._write_in_order(part, first_row, repacked)
            else:
                self._write_buckets(part, first_row, rows, writer)
        return {"receipts": receipts}

    def _repack(self, rows: PieceRows, positions: Ints) -> Bytes:
        return rows.layout.repack(rows.rows, rows.ids, self._files.layout, positions)

    def _write_buckets(self, part: int, first_row: int, rows: PieceRows, writer: Writer) -> None:
        """Write rows of a part, beginning with row `first_row` of it, a section for each bucket."""
        num_buckets = self._files.num_buckets(self._files.group(part))
        random = np.random.default_rng([self._files.seed, SCATTER, part, first_row])
        ends = np.zeros(num_buckets, np.int64)
        positions = _positions(random.integers(0, num_buckets, len(rows.rows)), ends)
        for bucket in np.split(self._repack(rows, positions), ends[:-1]):
            writer.section([bucket])

    def _write_in_order(self, part: int, first_row: int, rows: Bytes) -> list[Any]:
        """Write rows of a part, beginning with its row `first_row`; returns the receipts."""
        files = self._files
        if part < len(files.rows_per_part) - 1:
            return [files.write("train", sum(files.rows_per_part[:part]) + first_row, rows)]
        num_test = files.rows["test"]
        cut = min(max(num_test - first_row, 0), len(rows))
        return [
            files.write("test", min(first_row, num_test), rows[:cut]),
            files.write("val", max(first_row - num_test, 0), rows[cut:]),
        ]

    # ------------------------------------------------------------ second pass

    def gather_tasks(self) -> list[Task]:
        """The tasks of the second pass, one for each bucket; the first pass must be done."""
        tasks = []
        for group in range(len(self._files.group_rows)):
            first_row = sum(self._files.group_rows[:group])
            for bucket, num_rows in enumerate(self._bucket_rows(group).tolist()):
                tasks.append(self._gather_task(group, bucket, first_row, num_rows))
                first_row += num_rows
        return tasks

    def _gather_task(self, group: int, bucket: int, first_row: int, num_rows: int) -> Task:
        return Task(
            f"gathered/{group:03}_{bucket:06}",
            key_of(self._key, GATHER, group, bucket),
            lambda _: self._gather(group, bucket, first_row, num_rows),
            self._files.layout.row_bytes * num_rows,
        )

    def _find_sections(self, group: int) -> list[tuple[int, int]]:
        """(piece, the section of bucket 0) of all runs of a group, in order."""
        found = []
        for piece, runs in enumerate(self._runs):
            section = 0
            for part, _ in runs:
                its_group = self._files.group(part)
                if its_group == group:
                    found.append((piece, section))
                section += self._files.num_buckets(its_group) if its_group >= 0 else 0
        return found

    def _bucket_rows(self, group: int) -> Ints:
        """Number of rows of each bucket."""
        num_buckets = self._files.num_buckets(group)
        sizes = np.zeros(num_buckets, np.int64)
        for piece, section in self._sections[group]:
            task = self.scatter_tasks[piece]
            found = self._folder.read_or_rebuild(task, CheckedFile.section_sizes)
            sizes += found[section : section + num_buckets]
        return sizes // self._files.layout.row_bytes

    def _gather(self, group: int, bucket: int, first_row: int, num_rows: int) -> dict[str, Any]:
        row_bytes, count = self._files.layout.row_bytes, 0
        rows = np.empty((num_rows, row_bytes), np.uint8)
        for piece, section in self._sections[group]:
            content = self._folder.read_or_rebuild(
                self.scatter_tasks[piece], lambda file, s=section + bucket: file.section(s)
            )
            of_piece = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
            rows[count : count + len(of_piece)] = of_piece
            count += len(of_piece)
        assert count == num_rows
        order = np.random.default_rng([self._files.seed, GATHER, group, bucket]).permutation(count)
        receipts, step = [], self._files.sizes.rows_per_write
        for begin in range(0, num_rows, step):
            chosen = rows[order[begin : begin + step]]
            receipts.append(self._files.write("train", first_row + begin, chosen))
        return {"receipts": receipts}

    # ------------------------------------------------------------ the end

    def verify(self) -> None:
        """Read again the rows that this process did not write; write them again if they differ."""
        for task in (*self.scatter_tasks, *self.gather_tasks()):
            if task.name in self._folder.built:
                continue
            receipts = self._folder.read_or_rebuild(task, CheckedFile.meta)["receipts"]
            if not all(self._files.is_intact(receipt) for receipt in receipts):
                self._folder.discard(task)
                self._folder.ensure(task)
