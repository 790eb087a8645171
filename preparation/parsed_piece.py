"""A piece of parsed rows: the rules for its lines, and how it is built."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.errors import RankError
from criteo.columns import FIRST_SPARSE, NUM_FIELDS, NUM_SPARSE, Columns
from criteo.row_layout import Layout
from criteo.text import BAD_KINDS, OK, describe_bad_field, parse_lines
from preparation.category_ids import LocalIds
from preparation.work_folder import Task, Writer

PIECE_BYTES = 32 << 20  # of text
VERSION = 1  # of the pieces; changes where the same text gives other bytes
DRAWS_AT_A_TIME = 1 << 20


Show = Callable[[str, int, int], None]  # (task, how much of its size is done, lines)


class Draws(threading.local):
    """The numbers of RandomState(seed).uniform for all lines in order, from any line on.

    Each thread has a generator of its own, which nearly always finds its place ahead of it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random, self._at = np.random.RandomState(seed), 0

    def take(self, first: int, number: int) -> Any:
        """Numbers of lines `first`, ..."""
        if first < self._at:
            self._random, self._at = np.random.RandomState(self._seed), 0
        while self._at < first:
            skipped = min(first - self._at, DRAWS_AT_A_TIME)
            self._random.uniform(size=skipped)
            self._at += skipped
        self._at += number
        return self._random.uniform(size=number)


@dataclass(frozen=True)
class Rules:
    """What decides the rows of a piece beside its text; names and meanings are the flags'."""

    max_ind_range: int
    sub_sample_rate: float
    seed: int
    max_bad_lines: int

    @property
    def facts(self) -> list[Any]:
        """What tells whether pieces are the same."""
        draws = [self.sub_sample_rate, self.seed] if self.sub_sample_rate > 0 else None
        return [VERSION, PIECE_BYTES, self.max_ind_range, draws]

    @cached_property
    def draws(self) -> Draws:
        """A number for each line of all files."""
        return Draws(self.seed)


@dataclass(frozen=True)
class Piece:
    """A piece of parsed rows, and the task that makes it (and others, where it is read in turn)."""

    task: Task
    maker: Task


class PieceBuilder:
    """A piece while it is parsed: int32 columns in blocks, and what was counted.

    Args:
        rules: what becomes of a line.
        name_line: which line of which file is the piece's line n, from 0.
    """

    def __init__(self, rules: Rules, name_line: Callable[[int], str]) -> None:
        self._rules, self._name_line = rules, name_line
        self._blocks: list[Columns] = []
        self._runs: list[list[int]] = []
        self._counted = np.zeros(3 + NUM_FIELDS, np.int64)
        self._bad: Counter[str] = Counter()
        self._first_bad = ""
        self._bytes = 0

    @property
    def lines(self) -> int:
        """So far."""
        return int(self._counted[1])

    def add(self, part: int, text: bytes, drop: Any) -> None:
        """Parse lines of a part; those that `drop` names stay out if their label is 0."""
        columns = np.empty((NUM_FIELDS, text.count(b"\n")), np.int32)
        counted = np.zeros(3 + NUM_FIELDS, np.int64)
        as_array, at = np.frombuffer(text, np.uint8), 0
        while at < len(text):
            status, field, line, at = parse_lines(
                as_array, at, columns, max(self._rules.max_ind_range, 0), drop, counted
            )
            if status != OK:
                number = self.lines + int(counted[1]) - 1
                self._skip(status, number, describe_bad_field(status, field, text[line:at]))
        self._counted += counted
        self._bytes += len(text)
        self._take(part, np.ascontiguousarray(columns[:, : counted[0]]))

    def _skip(self, status: int, number: int, reason: str) -> None:
        """Count a bad line, or raise a UserError where it is one too many."""
        most = self._rules.max_bad_lines
        self._bad[BAD_KINDS[status]] += 1
        self._first_bad = self._first_bad or f"{self._name_line(number)}: {reason}"
        if self._bad.total() > most:
            name = self._name_line(number)
            raise RankError(f"{name}: {reason}{_what_to_do(name, most)}")

    def take_rows(self, part: int, columns: Columns) -> None:
        """Add rows (40, n) that need no parsing."""
        self._counted[:3] += columns.shape[1], columns.shape[1], int(columns[0].sum())
        self._take(part, columns)

    def _take(self, part: int, columns: Columns) -> None:
        self._blocks.append(columns)
        if self._runs and self._runs[-1][0] == part:
            self._runs[-1][1] += columns.shape[1]
        else:
            self._runs.append([part, columns.shape[1]])

    def write(self, writer: Writer, number_categories: bool = True) -> dict[str, Any]:
        """Write the sections; gives the meta."""
        rows, blocks = int(self._counted[0]), self._blocks
        distinct = [np.zeros(0, np.int32)] * NUM_SPARSE
        if number_categories:
            local = LocalIds(rows)
            distinct = [
                local.replace([block[column] for block in blocks])
                for column in range(FIRST_SPARSE, NUM_FIELDS)
            ]
        largest = [max((int(b[f].max(initial=0)) for b in blocks), default=0) for f in range(40)]
        layout = Layout.holding(largest)
        writer.section(layout.pack(block) for block in blocks)
        for values in distinct:
            writer.section([values])
        return {
            "columns": layout.columns,
            "runs": self._runs,
            "rows": rows,
            "lines": int(self._counted[1]),
            "clicks": int(self._counted[2]),
            "missing": self._counted[3:].tolist(),
            "kept_clicks": sum(int(block[0].sum()) for block in blocks),
            "largest": largest[:FIRST_SPARSE],
            "bad": dict(self._bad),
            "first_bad": self._first_bad,
            "bytes": self._bytes,
        }


def _what_to_do(name: str, most: int) -> str:
    if most:
        return f" (--max-bad-lines={most} allows no more)"
    if name.endswith(", line 1"):
        return "; if it is a header line, delete it (--max-bad-lines=1 skips it)"
    return "; --max-bad-lines=N skips and counts up to N such lines"
