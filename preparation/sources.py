"""The first step of preparing data: raw text, or the original's arrays, to pieces of parsed rows.

A piece is the lines that begin in PIECE_BYTES of a file's text, however many workers there are. It
holds, as sections of a file in the work folder: the kept rows, categories as places in the piece's
own lists of distinct values; then the 26 lists. Its meta counts what a report tells.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from criteo.original_files import Original, read_original
from criteo.raw_files import RawFile
from preparation import parsed_piece
from preparation.parsed_piece import VERSION, Piece, PieceBuilder, Rules, Show
from preparation.work_folder import Make, Task, WorkFolder, Writer, key_of

Segment = tuple[int, bytes]  # (part, whole lines of it)


@dataclass(frozen=True)
class LinePosition:
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


# ---------------------------------------------------------------- counting


def count_tasks(raw: RawFile, number: int) -> list[Task]:
    """Tasks whose metas count the file's lines: `lines`, a number for each of its pieces."""
    if raw.is_gzip:
        key = key_of("lines", parsed_piece.PIECE_BYTES, raw.fingerprint)
        return [Task(f"lines/{number:03}", key, lambda _: _count(raw, 0, None), raw.size)]
    return [
        Task(
            f"lines/{number:03}_{k:06}",
            key_of("lines", parsed_piece.PIECE_BYTES, raw.fingerprint, k),
            lambda _, k=k: _count(raw, k, k + 1),
            min(parsed_piece.PIECE_BYTES, raw.size - k * parsed_piece.PIECE_BYTES),
        )
        for k in range(_num_pieces(raw))
    ]


def _num_pieces(raw: RawFile) -> int:
    return -(-raw.size // parsed_piece.PIECE_BYTES)


def _count(raw: RawFile, begin: int, end: int | None) -> dict[str, Any]:
    """Lines of pieces `begin` to `end`, or to the file's last."""
    counts: list[int] = []
    with raw.lines(begin * parsed_piece.PIECE_BYTES) as lines:
        while not lines.is_at_end and (end is None or begin + len(counts) < end):
            blocks = lines.blocks((begin + len(counts) + 1) * parsed_piece.PIECE_BYTES)
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
        place: LinePosition,
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
        size = min(
            parsed_piece.PIECE_BYTES, max(self._raw.size - number * parsed_piece.PIECE_BYTES, 0)
        )
        make = make or (lambda writer: self._make(number, writer))
        return Task(name, self._key(number), make, size)

    def _make(self, number: int, writer: Writer) -> dict[str, Any]:
        """A piece by itself."""
        line = self._lines_before[number] if self._lines_before else -1
        with self._raw.lines(number * parsed_piece.PIECE_BYTES) as lines:
            blocks = lines.blocks((number + 1) * parsed_piece.PIECE_BYTES)
            meta = self._parse(blocks, number * parsed_piece.PIECE_BYTES, line, writer)
        self._show(f"{self._name}_{number:06}", 0, meta["lines"])
        return meta

    def _make_in_turn(self, _: Writer) -> dict[str, Any]:
        """All pieces, one after the other; those that are there already are only read over."""
        number, seen = 0, _Seen()
        with self._raw.lines() as lines:
            while not lines.is_at_end:
                begin, line, packed = lines.at, seen.lines, lines.packed
                blocks = seen.count(lines.blocks((number + 1) * parsed_piece.PIECE_BYTES))
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
        parsed = PieceBuilder(self._rules, lambda n: self._name_line(begin, line, n))
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


# ---------------------------------------------------------------- the original's arrays


class OriginalPieces:
    """Makes pieces of the arrays that the original program left, in turn; categories are ids."""

    def __init__(self, original: Original, folder: WorkFolder, show: Show) -> None:
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
        for number, (part, rows) in enumerate(read_original(self._original), 1):
            parsed = PieceBuilder(rules, str)
            parsed.take_rows(part, np.ascontiguousarray(rows.T))

            def make(writer: Writer, piece: PieceBuilder = parsed) -> dict[str, Any]:
                return piece.write(writer, number_categories=False)

            task = Task(f"parsed/000_{number - 1:06}", self._key(number - 1), make)
            self._folder.ensure(task)
            lines += len(rows)
            self._show("parsed/000", 0, len(rows))
        for file in self._files:
            file.check_unchanged()
        return {"pieces": number, "lines": lines}
