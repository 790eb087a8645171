"""The parsed pieces and their categories' ids, read from the work folder or rebuilt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from criteo.columns import NUM_SPARSE, Bytes
from criteo.report import TextCounts
from criteo.row_layout import Layout
from preparation.category_ids import IdMap
from preparation.checked_file import CheckedFile, Writer, key_of
from preparation.parsed_piece import Piece, Run
from preparation.work_folder import Task, WorkFolder

Ints = npt.NDArray[np.int32]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PieceRows:
    """The rows of a piece.

    Attributes:
        rows: (n, bytes of a row).
        layout: how `rows` are packed.
        ids: 26 arrays; ids[column][value] is the id of a category `value` of `rows`. None if the
            rows hold ids already.
    """

    rows: Bytes
    layout: Layout
    ids: list[Ints] | None


class PieceStore:
    """Reads parsed pieces by their number; a damaged or missing one is made again first."""

    def __init__(self, folder: WorkFolder, pieces: Sequence[Piece]) -> None:
        self._folder, self._pieces = folder, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def meta(self, number: int) -> dict[str, Any]:
        """The piece's meta; see PieceBuilder.write."""
        return self._read(number, CheckedFile.meta)

    def distinct_values(self, number: int, table: int) -> Ints:
        """(n,) distinct values of a category in the piece, in order of first appearance."""
        content = self._read(number, lambda file: file.section(1 + table))
        return np.frombuffer(content, np.int32)

    def rows(self, number: int) -> PieceRows:
        """The piece's rows, without ids."""
        layout = Layout.from_columns(self.meta(number)["columns"])
        content = self._read(number, lambda file: file.section(0))
        rows = np.frombuffer(content, np.uint8).reshape(-1, layout.row_bytes)
        return PieceRows(rows, layout, None)

    def discard(self, number: int) -> None:
        """Delete the piece's file."""
        self._folder.discard(self._pieces[number].task)

    def _read(self, number: int, read: Callable[[CheckedFile], Result]) -> Result:
        piece = self._pieces[number]
        maker = None if piece.maker is piece.task else piece.maker
        return self._folder.read_or_rebuild(piece.task, read, maker)


class IdStore:
    """The ids of all categories: a file for each table, with two sections for each piece.

    The first holds the ids of the piece's distinct values, the second those of its values that no
    piece before had. The second ones of all pieces together are the table's vocabulary.

    Args:
        folder: the work folder that holds the files.
        pieces: the pieces whose categories get ids.
        max_ind_range: bound of the values, or -1; see IdMap.
        key: the key of all pieces.
    """

    def __init__(
        self, folder: WorkFolder, pieces: PieceStore, max_ind_range: int, key: str
    ) -> None:
        self._folder, self._pieces, self._max_ind_range = folder, pieces, max_ind_range
        self.tasks = [self._task(table, key) for table in range(NUM_SPARSE)]

    def _task(self, table: int, key: str) -> Task:
        return Task(
            f"ids/{table:02}",
            key_of(key, "ids", table),
            lambda writer: self._write_ids(table, writer),
        )

    def _write_ids(self, table: int, writer: Writer) -> dict[str, Any]:
        ids = IdMap(self._max_ind_range)
        for number in range(len(self._pieces)):
            values, num_known = self._pieces.distinct_values(number, table), ids.num_ids
            of_piece = ids.ids(values)
            writer.section([of_piece])
            writer.section([values[of_piece >= num_known]])
        return {"num_ids": ids.num_ids}

    def counts(self) -> list[int]:
        """Rows of each table: the number of its ids."""
        metas = [self._folder.read_or_rebuild(task, CheckedFile.meta) for task in self.tasks]
        return [meta["num_ids"] for meta in metas]

    def rows(self, number: int) -> PieceRows:
        """A piece's rows and the ids of its categories."""
        piece = self._pieces.rows(number)
        ids = [
            self._folder.read_or_rebuild(task, lambda file: file.section(2 * number))
            for task in self.tasks
        ]
        arrays = [np.frombuffer(of_table, np.int32) for of_table in ids]
        return PieceRows(piece.rows, piece.layout, arrays)

    def values(self) -> Iterator[bytes]:
        """The values of id 0, 1, 2, ... (int32) of each table in turn, in blocks."""
        for task in self.tasks:
            sizes = self._folder.read_or_rebuild(task, CheckedFile.section_sizes)
            for number in np.flatnonzero(sizes[1::2]).tolist():
                yield self._folder.read_or_rebuild(
                    task, lambda file, section=2 * number + 1: file.section(section)
                )


@dataclass(frozen=True)
class Totals:
    """Sums over all pieces.

    Attributes:
        text: the counts over all files.
        lines_per_file: lines of each file.
        runs: for each piece its (part, number of rows), in the order of the piece's rows.
    """

    text: TextCounts
    lines_per_file: list[int]
    runs: list[list[Run]]

    def rows_per_part(self, num_parts: int) -> tuple[int, ...]:
        """Number of kept rows of each part."""
        rows_per_part = [0] * num_parts
        for runs in self.runs:
            for part, num_rows in runs:
                rows_per_part[part] += num_rows
        return tuple(rows_per_part)

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON takes them."""
        return {
            "text": self.text.to_json(),
            "lines_per_file": self.lines_per_file,
            "runs": self.runs,
        }

    @classmethod
    def from_json(cls, attributes: dict[str, Any]) -> "Totals":
        """The totals that `to_json` returned, read back from JSON."""
        text = TextCounts.from_json(attributes["text"])
        runs = [[(part, rows) for part, rows in of_piece] for of_piece in attributes["runs"]]
        return cls(text, attributes["lines_per_file"], runs)


def add_up(files: Sequence[PieceStore]) -> Totals:
    """The totals of all pieces, given as a store for each file."""
    text, lines_per_file, runs = TextCounts(), [], []
    for pieces in files:
        lines_before = text.lines
        for number in range(len(pieces)):
            meta = pieces.meta(number)
            runs.append(meta["runs"])
            text += TextCounts.from_json(meta["text"])
        lines_per_file.append(text.lines - lines_before)
    return Totals(text, lines_per_file, runs)
