"""The first step of preparing data: raw text, or the original's arrays, to pieces of parsed rows.

A piece is the lines that begin in PIECE_BYTES of a file's text, however many workers there are. It
holds, as sections of a file in the work folder: the kept rows, categories as places in the piece's
own lists of distinct values; then the 26 lists. Its meta counts what a report tells.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import original_files
from category_ids import LocalIds
from command_line import UserError
from criteo_files import RawFile
from criteo_text import (
    BAD_KINDS,
    FIRST_SPARSE,
    NUM_FIELDS,
    NUM_SPARSE,
    OK,
    Columns,
    describe_bad_field,
    parse_lines,
)
from row_layout import Layout
from work_folder import Make, Task, WorkFolder, Writer, key_of

PIECE_BYTES = 32 << 20  # of text
VERSION = 1  # of the pieces; changes where the same text gives other bytes
DRAWS_AT_A_TIME = 1 << 20

Segment = tuple[int, bytes]  # (part, whole lines of it)
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
class Place:
    """Where a text's lines stand among all lines.

    Attributes:
        number: of the file.
        first_line: of the file's first line among the lines of all files; -1: nobody counted.
        part_ends: number of the line, among all, behind each part's last one; none: each file is a
            part.
    """

    number: int
    first_line: int = -1
    part_ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of parsed rows, and the task that makes it (and others, where it is read in turn)."""

    task: Task
    maker: Task


# ---------------------------------------------------------------- counting


def count_tasks(raw: RawFile, number: int) -> list[Task]:
    """Tasks whose metas count the file's lines: `lines`, a number for each of its pieces."""
    if raw.is_gzip:
        key = key_of("lines", PIECE_BYTES, raw.fingerprint)
        return [Task(f"lines/{number:03}", key, lambda _: _count(raw, 0, None), raw.size)]
    return [
        Task(
            f"lines/{number:03}_{k:06}",
            key_of("lines", PIECE_BYTES, raw.fingerprint, k),
            lambda _, k=k: _count(raw, k, k + 1),
            min(PIECE_BYTES, raw.size - k * PIECE_BYTES),
        )
        for k in range(_num_pieces(raw))
    ]


def _num_pieces(raw: RawFile) -> int:
    return -(-raw.size // PIECE_BYTES)


def _count(raw: RawFile, begin: int, end: int | None) -> dict[str, Any]:
    """Lines of pieces `begin` to `end`, or to the file's last."""
    counts: list[int] = []
    with raw.lines(begin * PIECE_BYTES) as lines:
        while not lines.is_at_end and (end is None or begin + len(counts) < end):
            blocks = lines.blocks((begin + len(counts) + 1) * PIECE_BYTES)
            counts.append(sum(block.count(b"\n") for block in blocks))
    return {"lines": counts}


# ---------------------------------------------------------------- text


class TextPieces:
    """Makes the pieces of one file of text.

    Args:
        raw: the file.
        place: of its lines.
        counts: lines of each of its pieces, where they were counted.
        rules: what becomes of a line.
        folder: where pieces go.
        show: is told of a task's name, how much of its size is done and how many lines.
    """

    def __init__(
        self,
        raw: RawFile,
        place: Place,
        counts: Sequence[int],
        rules: Rules,
        folder: WorkFolder,
        show: Show,
    ) -> None:
        self._raw, self._place, self._rules, self._folder = raw, place, rules, folder
        self._show = show
        self._lines_before = np.cumsum([0, *counts]).tolist() if counts else []
        self._name = f"parsed/{place.number:03}"

    def tasks(self) -> list[Task]:
        """The tasks that make the pieces: one a piece, or one for a file that unpacks in turn."""
        if not self._raw.is_gzip:
            return [self._task(k) for k in range(_num_pieces(self._raw))]
        return [Task(self._name, self._key("all"), self._make_in_turn, self._raw.size)]

    def pieces(self) -> list[Piece]:
        """All pieces, once the tasks are done."""
        tasks = self.tasks()
        if not self._raw.is_gzip:
            return [Piece(task, task) for task in tasks]
        number = self._folder.intact(self._folder.meta, tasks[0])["pieces"]
        return [Piece(self._task(k), tasks[0]) for k in range(number)]

    def _key(self, number: object) -> str:
        place = self._place
        lines = [place.first_line, *place.part_ends] if place.first_line >= 0 else []
        facts = [place.number, lines, self._raw.fingerprint, self._rules.facts]
        return key_of("parsed", number, *facts)

    def _task(self, number: int, make: Make | None = None) -> Task:
        name = f"{self._name}_{number:06}"
        size = min(PIECE_BYTES, max(self._raw.size - number * PIECE_BYTES, 0))
        make = make or (lambda writer: self._make(number, writer))
        return Task(name, self._key(number), make, size)

    def _make(self, number: int, writer: Writer) -> dict[str, Any]:
        """A piece by itself."""
        line = self._lines_before[number] if self._lines_before else -1
        with self._raw.lines(number * PIECE_BYTES) as lines:
            blocks = lines.blocks((number + 1) * PIECE_BYTES)
            meta = self._parse(blocks, number * PIECE_BYTES, line, writer)
        self._show(f"{self._name}_{number:06}", 0, meta["lines"])
        return meta

    def _make_in_turn(self, _: Writer) -> dict[str, Any]:
        """All pieces, one after the other; those that are there already are only read over."""
        number, seen = 0, _Seen()
        with self._raw.lines() as lines:
            while not lines.is_at_end:
                begin, line, packed = lines.at, seen.lines, lines.packed
                blocks = seen.count(lines.blocks((number + 1) * PIECE_BYTES))
                task = self._task(
                    number,
                    lambda writer, at=begin, them=blocks, n=line: self._parse(them, at, n, writer),
                )
                self._folder.ensure(task)
                for _block in blocks:  # what is there already
                    pass
                self._show(self._name, lines.packed - packed, seen.lines - line)
                number += 1
        return {"pieces": number, "lines": seen.lines}

    def _parse(
        self, blocks: Iterable[bytes], begin: int, line: int, writer: Writer
    ) -> dict[str, Any]:
        """Write a piece.

        Args:
            blocks: its lines.
            begin: its first byte.
            line: lines of the file before it; -1: unknown.
            writer: takes the sections.
        """
        parsed = _Parsed(self._rules, lambda n: self._name_line(begin, line, n))
        first = self._place.first_line + line if self._place.first_line >= 0 else -1
        for part, text in self._segments(blocks, first):
            drop = np.zeros(0, bool)
            if self._rules.sub_sample_rate > 0:
                draws = self._rules.draws.take(first + parsed.lines, text.count(b"\n"))
                drop = draws < self._rules.sub_sample_rate
            parsed.add(part, text, drop)
        return parsed.write(writer)

    def _segments(self, blocks: Iterable[bytes], line: int) -> Iterator[Segment]:
        """The lines by part; `line` is the first one's number among all."""
        ends = self._place.part_ends
        for block in blocks:
            if not ends:
                yield self._place.number, block
                continue
            number = block.count(b"\n")
            if line + number > ends[-1]:  # more lines than were counted
                self._raw.check_unchanged()
            part = int(np.searchsorted(ends, line, side="right"))
            while line + number > ends[part]:
                mine = ends[part] - line
                cut = _end_of_line(block, mine)
                yield part, block[:cut]
                block, line, number, part = block[cut:], line + mine, number - mine, part + 1
            yield part, block
            line += number

    def _name_line(self, begin: int, line: int, number: int) -> str:
        """Which line of the file is the piece's line `number`, from 0."""
        if line < 0:
            line = 0
            with self._raw.lines() as lines:
                line = sum(block.count(b"\n") for block in lines.blocks(begin))
        return f"{self._raw.path}, line {line + number + 1}"


class _Seen:
    """Counts the lines that go by."""

    def __init__(self) -> None:
        self.lines = 0

    def count(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The blocks."""
        for block in blocks:
            self.lines += block.count(b"\n")
            yield block


def _end_of_line(text: bytes, number: int) -> int:
    """Where line `number`, from 1, ends in `text`."""
    newlines = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return int(newlines[number - 1]) + 1


class _Parsed:
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
            raise UserError(f"{name}: {reason}{_what_to_do(name, most)}")

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


# ---------------------------------------------------------------- the original's arrays


class OriginalPieces:
    """Makes pieces of the arrays that the original program left, in turn; categories are ids."""

    def __init__(self, original: original_files.Original, folder: WorkFolder, show: Show) -> None:
        self._original, self._folder, self._show = original, folder, show
        self._files = [RawFile.at(path) for path in original.files]

    def tasks(self) -> list[Task]:
        """The one task that makes all pieces."""
        size = sum(file.size for file in self._files)
        return [Task("parsed/000", self._key("all"), self._make, size)]

    def pieces(self) -> list[Piece]:
        """All pieces, once the task is done."""
        (maker,) = self.tasks()
        return [
            Piece(Task(f"parsed/000_{k:06}", self._key(k), maker.make), maker)
            for k in range(self._folder.intact(self._folder.meta, maker)["pieces"])
        ]

    def _key(self, number: object) -> str:
        files = [file.fingerprint for file in self._files]
        return key_of("original", VERSION, number, files, self._original.rows_per_part)

    def _make(self, _: Writer) -> dict[str, Any]:
        lines = number = 0
        rules = Rules(-1, 0.0, 0, 0)
        for number, (part, rows) in enumerate(original_files.read(self._original), 1):
            parsed = _Parsed(rules, str)
            parsed.take_rows(part, np.ascontiguousarray(rows.T))

            def make(writer: Writer, piece: _Parsed = parsed) -> dict[str, Any]:
                return piece.write(writer, number_categories=False)

            task = Task(f"parsed/000_{number - 1:06}", self._key(number - 1), make)
            self._folder.ensure(task)
            lines += len(rows)
            self._show("parsed/000", 0, len(rows))
        for file in self._files:
            file.check_unchanged()
        return {"pieces": number, "lines": lines}
