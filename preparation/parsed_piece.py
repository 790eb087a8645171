"""A parsed piece: the rows of some text, its distinct categories and what was counted in it.

Its checked file has 27 sections: the kept rows, in which a category is an index into the piece's
own list of the column's distinct values, and then these 26 lists (int32).
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import RankError
from criteo.columns import FIRST_SPARSE, NUM_FIELDS, NUM_SPARSE, Columns
from criteo.report import TextCounts
from criteo.row_layout import Layout
from criteo.text import BAD_KINDS, OK, describe_bad_field, parse_lines
from preparation.category_ids import LocalIds
from preparation.checked_file import Writer
from preparation.work_folder import Task

VERSION = 2  # of the file of a piece: raise it if the same text gives other bytes than before
DRAWS_PER_SKIP = 1 << 20

Run = tuple[int, int]  # (part, number of rows): consecutive rows of one part


class Draws(threading.local):
    """The sequence of RandomState(seed).uniform(), a number for each line of all files.

    Each thread has a generator of its own. Going back starts the sequence again, which is rare:
    a thread's tasks mostly go forward.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random, self._next = np.random.RandomState(seed), 0

    def take(self, first: int, count: int) -> npt.NDArray[np.float64]:
        """The numbers (count,) of the lines from `first` on."""
        if first < self._next:
            self._random, self._next = np.random.RandomState(self._seed), 0
        while self._next < first:
            skipped = min(first - self._next, DRAWS_PER_SKIP)
            self._random.uniform(size=skipped)
            self._next += skipped
        self._next += count
        return self._random.uniform(size=count)


@dataclass(frozen=True)
class ParseRules:
    """The flags that decide how lines become rows; see DataSpec for the attributes."""

    max_ind_range: int
    sub_sample_rate: float
    seed: int
    max_bad_lines: int

    @property
    def facts(self) -> list[Any]:
        """Everything here that decides a piece's bytes."""
        draws = [self.sub_sample_rate, self.seed] if self.sub_sample_rate > 0 else None
        return [VERSION, self.max_ind_range, draws]

    @cached_property
    def draws(self) -> Draws:
        """A number in [0, 1) for each line of all files."""
        return Draws(self.seed)


@dataclass(frozen=True)
class Piece:
    """A parsed piece in the work folder.

    Attributes:
        task: the task of its file.
        maker: the task that makes the file: `task`, unless one task makes all pieces of a source.
    """

    task: Task
    maker: Task


class PieceBuilder:
    """Collects the rows of a piece, as blocks of int32 columns, and counts what is in its lines.

    Args:
        rules: how lines become rows.
        name_line: takes a line's number in the piece, from 0; returns its file and number there.
    """

    def __init__(self, rules: ParseRules, name_line: Callable[[int], str]) -> None:
        self._rules, self._name_line = rules, name_line
        self._blocks: list[Columns] = []
        self._runs: list[list[int]] = []
        self._counted = np.zeros(3 + NUM_FIELDS, np.int64)  # rows, lines, clicks, missing (40,)
        self._bad: Counter[str] = Counter()
        self._first_bad = ""
        self._text_bytes = 0

    @property
    def num_lines(self) -> int:
        """Number of lines added so far."""
        return int(self._counted[1])

    def add(self, part: int, text: bytes, drop: npt.NDArray[np.bool_]) -> None:
        """Parse whole lines of a part.

        Args:
            part: the part that the lines belong to.
            text: n lines.
            drop: (n,) or (0,): True leaves the line out if its label is 0.

        Raises:
            RankError: there are more bad lines than the rules allow.
        """
        columns = np.empty((NUM_FIELDS, text.count(b"\n")), np.int32)
        counted = np.zeros(3 + NUM_FIELDS, np.int64)
        as_array, offset = np.frombuffer(text, np.uint8), 0
        while offset < len(text):
            status, column, begin, offset = parse_lines(
                as_array, offset, columns, max(self._rules.max_ind_range, 0), drop, counted
            )
            if status != OK:
                line = self.num_lines + int(counted[1]) - 1
                self._skip(status, line, describe_bad_field(status, column, text[begin:offset]))
        self._counted += counted
        self._text_bytes += len(text)
        self._append(part, np.ascontiguousarray(columns[:, : counted[0]]))

    def _skip(self, status: int, line: int, fault: str) -> None:
        """Count a bad line; raise a RankError if the rules allow no more of them."""
        most = self._rules.max_bad_lines
        self._bad[BAD_KINDS[status]] += 1
        self._first_bad = self._first_bad or f"{self._name_line(line)}: {fault}"
        if self._bad.total() > most:
            name = self._name_line(line)
            raise RankError(f"{name}: {fault}{_advice(name, most)}")

    def add_rows(self, part: int, columns: Columns) -> None:
        """Add rows (40, n) of a part that need no parsing."""
        self._counted[:3] += columns.shape[1], columns.shape[1], int(columns[0].sum())
        self._append(part, columns)

    def _append(self, part: int, columns: Columns) -> None:
        self._blocks.append(columns)
        if self._runs and self._runs[-1][0] == part:
            self._runs[-1][1] += columns.shape[1]
        else:
            self._runs.append([part, columns.shape[1]])

    def write(self, writer: Writer, index_categories: bool = True) -> dict[str, Any]:
        """Write the piece's sections.

        Args:
            writer: writes the piece's file.
            index_categories: replace categories by indices; False: they are ids already.

        Returns:
            The meta: `columns` of the rows' layout, `runs`, and `text`, which is a TextCounts.
        """
        blocks = self._blocks
        distinct = [np.zeros(0, np.int32)] * NUM_SPARSE
        if index_categories:
            local = LocalIds(int(self._counted[0]))
            distinct = [
                local.replace([block[column] for block in blocks])
                for column in range(FIRST_SPARSE, NUM_FIELDS)
            ]
        largest = [
            max((int(block[column].max(initial=0)) for block in blocks), default=0)
            for column in range(NUM_FIELDS)
        ]
        layout = Layout.holding(largest)
        writer.section(layout.pack(block) for block in blocks)
        for values in distinct:
            writer.section([values])
        text = self._text_counts(largest[:FIRST_SPARSE]).to_json()
        return {"columns": layout.columns, "runs": self._runs, "text": text}

    def _text_counts(self, largest: list[int]) -> TextCounts:
        return TextCounts(
            lines=self.num_lines,
            text_bytes=self._text_bytes,
            clicks=int(self._counted[2]),
            rows=int(self._counted[0]),
            kept_clicks=sum(int(block[0].sum()) for block in self._blocks),
            missing=tuple(self._counted[3:].tolist()),
            largest=tuple(largest),
            bad=dict(self._bad),
            first_bad=self._first_bad,
        )


def _advice(name: str, most: int) -> str:
    """What the user can do about a bad line."""
    if most:
        return f" (--max-bad-lines={most} allows no more)"
    if name.endswith(", line 1"):
        return "; if it is a header line, delete it (--max-bad-lines=1 skips it)"
    return "; --max-bad-lines=N skips and counts up to N such lines"
