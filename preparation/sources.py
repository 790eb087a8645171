"""The sources of parsed pieces: raw text, or the arrays that the original program left.

A piece is the lines that begin in a fixed number of bytes of a file's text, however many processes
and threads do the work.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.shares import split_evenly
from criteo.original_files import Original, read_original
from criteo.raw_files import RawFile
from preparation.checked_file import CheckedFile, Writer, key_of
from preparation.parsed_piece import VERSION, ParseRules, Piece, PieceBuilder
from preparation.sizes import Sizes
from preparation.stage import StageProgress
from preparation.work_folder import Make, Task, WorkFolder


@dataclass(frozen=True)
class CutFile:
    """A raw file whose text is cut into pieces.

    Attributes:
        raw: the file.
        number: the file's number among all files.
        sizes: how large pieces and blocks are.
    """

    raw: RawFile
    number: int
    sizes: Sizes

    @property
    def num_pieces(self) -> int:
        """Number of pieces of a plain file; that of a packed one is known only once it is read."""
        return -(-self.raw.size // self.sizes.piece_bytes)

    def begin(self, piece: int) -> int:
        """First byte of the piece in the file's text."""
        return piece * self.sizes.piece_bytes

    def size(self, piece: int) -> int:
        """Bytes of the piece in a plain file."""
        return min(self.sizes.piece_bytes, max(self.raw.size - self.begin(piece), 0))

    def key(self, *facts: Any) -> str:
        """A key that changes with the file, the size of pieces and the facts."""
        return key_of(self.number, self.sizes.piece_bytes, self.raw.fingerprint, *facts)


@dataclass(frozen=True)
class LinePosition:
    """Where a file's lines are among the lines of all files; -1 and () if they were not counted.

    Attributes:
        first_line: number of the file's first line among all lines.
        lines_per_piece: number of lines of each piece of the file.
        part_ends: for each part the number, among all lines, of the line behind its last one; ()
            if each file is a part.
    """

    first_line: int = -1
    lines_per_piece: tuple[int, ...] = ()
    part_ends: tuple[int, ...] = ()


# ---------------------------------------------------------------- counting


def count_tasks(file: CutFile) -> list[Task]:
    """Tasks that count lines: a task's meta has `lines`, a number for each of its pieces."""
    name = f"lines/{file.number:03}"
    if file.raw.is_gzip:
        return [Task(name, file.key("lines"), lambda _: _count(file, 0, None), file.raw.size)]
    return [
        Task(
            f"{name}_{piece:06}",
            file.key("lines", piece),
            lambda _, piece=piece: _count(file, piece, piece + 1),
            file.size(piece),
        )
        for piece in range(file.num_pieces)
    ]


def _count(file: CutFile, first: int, end: int | None) -> dict[str, Any]:
    """Count the lines of the pieces from `first` up to `end`, or up to the file's last one."""
    counts: list[int] = []
    with file.raw.lines(file.begin(first), file.sizes.block_bytes) as lines:
        while not lines.is_at_end and (end is None or first + len(counts) < end):
            blocks = lines.blocks(file.begin(first + len(counts) + 1))
            counts.append(sum(block.count(b"\n") for block in blocks))
    return {"lines": counts}


def read_counts(folder: WorkFolder, tasks: Sequence[Task]) -> list[int]:
    """The number of lines of each piece, from the files of `count_tasks`."""
    metas = [folder.read_or_rebuild(task, CheckedFile.meta) for task in tasks]
    return [count for meta in metas for count in meta["lines"]]


def line_positions(
    lines_per_piece: Sequence[Sequence[int]], num_parts: int = 0
) -> list[LinePosition]:
    """The positions of the lines of files that were counted.

    Args:
        lines_per_piece: number of lines of each piece of each file.
        num_parts: equal parts that the lines are cut into; 0: each file is a part.
    """
    ends = np.cumsum([sum(of_file) for of_file in lines_per_piece]).tolist()
    parts = split_evenly(ends[-1], num_parts) if num_parts else []
    part_ends = tuple(np.cumsum(parts, dtype=int).tolist())
    return [
        LinePosition(first, tuple(of_file), part_ends)
        for first, of_file in zip([0, *ends], lines_per_piece, strict=False)
    ]


# ---------------------------------------------------------------- text


class TextPieces:
    """Makes the pieces of one file of text.

    Args:
        file: the file of text.
        position: where its lines are among all lines.
        rules: how lines become rows.
        folder: the work folder that holds the pieces' files.
        progress: shows how many pieces are finished.
    """

    def __init__(
        self,
        file: CutFile,
        position: LinePosition,
        rules: ParseRules,
        folder: WorkFolder,
        progress: StageProgress,
    ) -> None:
        self._file, self._position, self._rules = file, position, rules
        self._folder, self._progress = folder, progress
        self._lines_before = np.cumsum([0, *position.lines_per_piece]).tolist()
        self._name = f"parsed/{file.number:03}"

    def tasks(self) -> list[Task]:
        """The tasks that make the pieces: one for each, or a single one for a packed file."""
        if not self._file.raw.is_gzip:
            return [self._task(piece) for piece in range(self._file.num_pieces)]
        return [Task(self._name, self._key("all"), self._make_all, self._file.raw.size)]

    def pieces(self) -> list[Piece]:
        """All pieces, once the tasks are done."""
        tasks = self.tasks()
        if not self._file.raw.is_gzip:
            return [Piece(task, task) for task in tasks]
        meta = self._folder.read_or_rebuild(tasks[0], CheckedFile.meta)
        return [Piece(self._task(piece), tasks[0]) for piece in range(meta["num_pieces"])]

    def _key(self, piece: int | str) -> str:
        position = self._position
        lines = [position.first_line, position.part_ends] if position.first_line >= 0 else []
        return self._file.key("parsed", piece, lines, self._rules.facts)

    def _task(self, piece: int, make: Make | None = None) -> Task:
        make = make or (lambda writer: self._make(piece, writer))
        return Task(f"{self._name}_{piece:06}", self._key(piece), make, self._file.size(piece))

    def _make(self, piece: int, writer: Writer) -> dict[str, Any]:
        """Make a piece of a file that can be read from any byte on."""
        file, line = self._file, -1
        if self._position.lines_per_piece:
            line = self._lines_before[piece]
        with file.raw.lines(file.begin(piece), file.sizes.block_bytes) as lines:
            meta = self._parse(lines.blocks(file.begin(piece + 1)), file.begin(piece), line, writer)
        self._progress.advance(f"{self._name}_{piece:06}", 0, meta["text"]["lines"])
        return meta

    def _make_all(self, _: Writer) -> dict[str, Any]:
        """Make all pieces of a packed file in order; it is read whole, even if one is missing."""
        file, piece, num_lines = self._file, 0, 0
        with file.raw.lines(0, file.sizes.block_bytes) as lines:
            while not lines.is_at_end:
                begin, packed = lines.at, lines.packed
                blocks = _CountedBlocks(lines.blocks(file.begin(piece + 1)))
                task = self._task(
                    piece,
                    lambda writer, blocks=blocks, begin=begin, line=num_lines: self._parse(
                        blocks, begin, line, writer
                    ),
                )
                self._folder.ensure(task)
                for _block in blocks:  # nobody has read them if the piece was there already
                    pass
                self._progress.advance(self._name, lines.packed - packed, blocks.num_lines)
                num_lines += blocks.num_lines
                piece += 1
        return {"num_pieces": piece}

    def _parse(
        self, blocks: Iterable[bytes], begin: int, line: int, writer: Writer
    ) -> dict[str, Any]:
        """Write a piece.

        Args:
            blocks: the piece's lines.
            begin: the piece's first byte in the file's text.
            line: number of the file's lines before the piece; -1 if they were not counted.
            writer: writes the piece's file.
        """
        builder = PieceBuilder(self._rules, lambda n: self._name_line(begin, line, n))
        first = self._position.first_line + line if self._position.first_line >= 0 else -1
        for part, text in self._cut_into_parts(blocks, first):
            drop = np.zeros(0, bool)
            if self._rules.sub_sample_rate > 0:
                draws = self._rules.draws.take(first + builder.num_lines, text.count(b"\n"))
                drop = draws < self._rules.sub_sample_rate
            builder.add(part, text, drop)
        return builder.write(writer)

    def _cut_into_parts(self, blocks: Iterable[bytes], line: int) -> Iterator[tuple[int, bytes]]:
        """(part, whole lines of it) in order; `line` is the first line's number among all."""
        ends = self._position.part_ends
        for block in blocks:
            if not ends:
                yield self._file.number, block
                continue
            num_lines = block.count(b"\n")
            if line + num_lines > ends[-1]:  # more lines than were counted
                self._file.raw.check_unchanged()
            part = int(np.searchsorted(ends, line, side="right"))
            while line + num_lines > ends[part]:
                num_mine = ends[part] - line
                cut = _end_of_line(block, num_mine)
                yield part, block[:cut]
                block, line, num_lines = block[cut:], line + num_mine, num_lines - num_mine
                part += 1
            yield part, block
            line += num_lines

    def _name_line(self, begin: int, line: int, number: int) -> str:
        """The file and the number in it, from 1, of a piece's line `number`, from 0."""
        if line < 0:
            with self._file.raw.lines() as lines:
                line = sum(block.count(b"\n") for block in lines.blocks(begin))
        return f"{self._file.raw.path}, line {line + number + 1}"


class _CountedBlocks:
    """Blocks that are read once, perhaps by two readers in turn; counts their lines meanwhile."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self.num_lines = blocks, 0

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self.num_lines += block.count(b"\n")
            yield block


def _end_of_line(text: bytes, number: int) -> int:
    """Offset in `text` behind its line `number`, counted from 1."""
    newlines = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return int(newlines[number - 1]) + 1


# ---------------------------------------------------------------- the original's arrays


class OriginalPieces:
    """Makes pieces of the arrays that the original program left; their categories are ids already.

    Args:
        original: the arrays' files.
        folder: the work folder that holds the pieces' files.
        progress: shows how many rows are finished.
    """

    def __init__(self, original: Original, folder: WorkFolder, progress: StageProgress) -> None:
        self._original, self._folder, self._progress = original, folder, progress
        self._files = [RawFile.at(path) for path in original.files]

    def tasks(self) -> list[Task]:
        """The one task that makes all pieces, in order."""
        size = sum(file.size for file in self._files)
        return [Task("parsed/000", self._key("all"), self._make_all, size)]

    def pieces(self) -> list[Piece]:
        """All pieces, once the task is done."""
        (maker,) = self.tasks()
        num_pieces = self._folder.read_or_rebuild(maker, CheckedFile.meta)["num_pieces"]
        return [Piece(self._task(piece, maker.make), maker) for piece in range(num_pieces)]

    def _key(self, piece: int | str) -> str:
        files = [file.fingerprint for file in self._files]
        return key_of("original", VERSION, piece, files, self._original.rows_per_part)

    def _task(self, piece: int, make: Make) -> Task:
        return Task(f"parsed/000_{piece:06}", self._key(piece), make)

    def _make_all(self, _: Writer) -> dict[str, Any]:
        num_pieces = 0
        rules = ParseRules(max_ind_range=-1, sub_sample_rate=0.0, seed=0, max_bad_lines=0)
        for part, rows in read_original(self._original):
            builder = PieceBuilder(rules, str)
            builder.add_rows(part, np.ascontiguousarray(rows.T))
            write = _writer_of(builder)
            self._folder.ensure(self._task(num_pieces, write))
            self._progress.advance("parsed/000", 0, len(rows))
            num_pieces += 1
        for file in self._files:
            file.check_unchanged()
        return {"num_pieces": num_pieces}


def _writer_of(builder: PieceBuilder) -> Make:
    return lambda writer: builder.write(writer, index_categories=False)


Source = TextPieces | OriginalPieces
