"""Criteo text whose rows are to be scored: with or without labels, plain, gzip or from stdin."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from criteo.columns import NUM_FIELDS, Columns
from criteo.raw_files import Lines, RawFile, what_is_at
from criteo.text import OK, describe_bad_field, parse_lines

STDIN = "-"
BLOCK_BYTES = 2 << 20  # of text that are parsed at a time
SAMPLE_BYTES = 1 << 20  # of a file, from which its lines are guessed
LINE_BYTES = 16 << 20  # a longer line may count as two, so that scores no longer go with the lines
_ENDLESS = 1 << 62

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ParsedLines:
    """Consecutive lines of the text.

    Attributes:
        columns: (40, n) int32: the rows of the lines that are not bad; without labels these are 0.
        is_row: (lines,) whether a line is not bad.
    """

    columns: Columns
    is_row: Flags


@dataclass
class ScoredText:
    """Rows of text, given from its beginning to its end.

    Attributes:
        name: what messages call it.
        max_ind_range: categories are taken modulo this; -1: they are not.
        max_bad_lines: number of bad lines that are skipped before one is an error.
        has_labels: whether its lines begin with a label, as the first line that is not of another
            form does or not; known when the first lines are parsed.
        num_lines: lines parsed so far.
        num_bad: bad ones among them.
        first_bad: where the first bad line is, and why it is bad.
    """

    name: str
    max_ind_range: int
    max_bad_lines: int
    has_labels: bool = field(default=True, init=False)
    num_lines: int = field(default=0, init=False)
    num_bad: int = field(default=0, init=False)
    first_bad: str = field(default="", init=False)

    def parse(self, text: bytes) -> ParsedLines:
        """The next lines, each of which ends in a newline.

        Raises:
            UserError: there are more bad lines than are skipped, or the first one is of no format.
        """
        if self.num_bad == self.num_lines:
            self._find_form(text)
        return self._parse(text)

    def _find_form(self, text: bytes) -> None:
        """Set `has_labels` by the first line that can be a row, if only skipped ones precede it."""
        most = self.max_bad_lines - self.num_bad + 1
        counts = [line.count(b"\t") + 1 for line in text.split(b"\n", most)[:-1]]
        form = next((n for n in counts if n in (NUM_FIELDS, NUM_FIELDS - 1)), None)
        if form is None and len(counts) == most:
            raise UserError(
                f"{self.name}, line {self.num_lines + 1}: {counts[0]} tab-separated fields,"
                f" expected {NUM_FIELDS} (label, 13 integers, 26 hex strings) or, without the"
                f" label, {NUM_FIELDS - 1}"
            )
        self.has_labels = form != NUM_FIELDS - 1

    def _parse(self, text: bytes) -> ParsedLines:
        num_lines = text.count(b"\n")
        if not self.has_labels:
            text = b"0\t" + text[:-1].replace(b"\n", b"\n0\t") + b"\n"
        columns = np.empty((NUM_FIELDS, num_lines), np.int32)
        counted = np.zeros(3 + NUM_FIELDS, np.int64)
        drop, is_row = np.zeros(0, np.bool_), np.ones(num_lines, np.bool_)
        as_array, offset = np.frombuffer(text, np.uint8), 0
        while offset < len(text):
            status, column, begin, offset = parse_lines(
                as_array, offset, columns, max(self.max_ind_range, 0), drop, counted
            )
            if status != OK:
                line = int(counted[1]) - 1
                is_row[line] = False
                fault = describe_bad_field(status, column, text[begin:offset], self.has_labels)
                self._skip(line, fault)
        self.num_lines += num_lines
        return ParsedLines(columns[:, : counted[0]], is_row)

    def _skip(self, line: int, fault: str) -> None:
        """Count a bad line; raise a UserError if no more of them are skipped."""
        self.num_bad += 1
        where = f"{self.name}, line {self.num_lines + line + 1}: {fault}"
        self.first_bad = self.first_bad or where
        if self.num_bad > self.max_bad_lines:
            most = self.max_bad_lines
            advice = f" (--max-bad-lines={most} allows no more)" if most else ""
            advice = advice or "; --max-bad-lines=N skips up to N such lines, whose score is nan"
            raise UserError(f"{where}{advice}")


def blocks_of_file(name: str) -> Iterator[bytes]:
    """The text's lines in blocks; each line ends in a newline.

    Args:
        name: path of the text, plain or `.gz`; `-`: stdin.

    Raises:
        RankError: the file cannot be read.
    """
    if name == STDIN:
        yield from Lines(sys.stdin.buffer, 0, BLOCK_BYTES, LINE_BYTES).blocks(_ENDLESS)
        return
    with RawFile.at(Path(name)).lines(0, BLOCK_BYTES, LINE_BYTES) as lines:
        yield from lines.blocks(_ENDLESS)


def about_num_lines(name: str) -> int | None:
    """About how many lines a text has, judged by its first ones; None for stdin.

    Args:
        name: path of the text; `-`: stdin.
    """
    if name == STDIN:
        return None
    file = RawFile.at(Path(name))
    text, unpacked = file.sample(SAMPLE_BYTES)
    return int(text.count(b"\n") * file.size * unpacked / max(len(text), 1))


def check_text(name: str) -> None:
    """Raise a UserError if there is no such text to read.

    Args:
        name: its path; `-`: stdin.
    """
    if name == STDIN:
        if sys.stdin is None:
            raise UserError("--predict-file=-: stdin is closed: send rows there, or name a file")
        return
    path = Path(name)
    if not path.is_file():
        pipe = "; - reads what another program writes" if path.is_fifo() else ""
        raise UserError(f"--predict-file={name}: {what_is_at(path)}{pipe}")
    if not os.access(path, os.R_OK):
        raise UserError(f"--predict-file={name}: no permission to read it")


@dataclass(frozen=True)
class RowsOfBatch:
    """The rows of a batch, and the lines that they come from.

    Attributes:
        columns: (40, n) int32.
        is_row: (lines,) which lines are rows, from the one behind the batch before on. Bad lines at
            the end of the text belong to its last batch, which may have no rows.
    """

    columns: Columns
    is_row: Flags


def in_batches(blocks: Iterator[ParsedLines], batch_size: int) -> Iterator[RowsOfBatch]:
    """The same rows in batches of one size; the last one may be smaller.

    Args:
        blocks: consecutive lines.
        batch_size: rows of a batch.
    """
    waiting: list[ParsedLines] = []
    num_rows = 0
    for block in blocks:
        waiting.append(block)
        num_rows += block.columns.shape[1]
        if num_rows < batch_size:
            continue
        columns = np.concatenate([lines.columns for lines in waiting], axis=1)
        is_row = np.concatenate([lines.is_row for lines in waiting])
        line_of_row = np.flatnonzero(is_row)
        begin = line = 0
        for end in range(batch_size, num_rows + 1, batch_size):
            next_line = int(line_of_row[end - 1]) + 1
            yield RowsOfBatch(columns[:, begin:end], is_row[line:next_line])
            begin, line = end, next_line
        waiting = [ParsedLines(columns[:, begin:], is_row[line:])]
        num_rows -= begin
    if waiting:
        columns = np.concatenate([lines.columns for lines in waiting], axis=1)
        is_row = np.concatenate([lines.is_row for lines in waiting])
        if len(is_row):
            yield RowsOfBatch(columns, is_row)
