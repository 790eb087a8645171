"""Files of scores, one for each line of the text, written while the scores are computed.

Their kind follows from the name: `.npy` is a float32 array, `.parquet` has one column `score`, any
other name is text, a score a line. A line that is no row has the score nan.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.versions import problem_of_import
from common.whole_files import check_place

STDOUT = "-"
FLAG = "--scores-file"
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-parquet.txt"
ROWS_PER_GROUP = 1 << 20  # of a parquet file
_NPY_BYTES = 128  # of the header; numpy's own are multiples of 64

Scores = npt.NDArray[np.float32]


class ScoreFile(Protocol):
    """A file of scores that is being written."""

    def write(self, scores: Scores) -> None:
        """Append (n,) scores."""

    def finish(self) -> None:
        """Write what can only be written when all scores are there."""

    def leave(self) -> None:
        """Write nothing any more, also if the scores ended in an error."""


class TextScores:
    """A score a line, with the nine digits that tell any two float32 numbers apart."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, scores: Scores) -> None:
        """Append (n,) scores."""
        self._file.write(("%.9g\n" * len(scores) % tuple(scores.tolist())).encode())

    def finish(self) -> None:
        """Nothing is left to write."""

    def leave(self) -> None:
        """Nothing is written by itself."""


class NpyScores:
    """numpy's format 1.0, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.

    The length stands in the header, which is written twice for that.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._num_rows = file, 0
        file.write(self._header())

    def _header(self) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self._num_rows},), }}"
        text = text.ljust(_NPY_BYTES - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")

    def write(self, scores: Scores) -> None:
        """Append (n,) scores."""
        self._num_rows += len(scores)
        self._file.write(scores.astype("<f4").tobytes())

    def finish(self) -> None:
        """Write the length."""
        self._file.seek(0)
        self._file.write(self._header())

    def leave(self) -> None:
        """Nothing is written by itself."""


class ParquetScores:
    """An Apache Parquet file, written by pyarrow a row group at a time."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow
        from pyarrow import parquet

        self._pyarrow = pyarrow
        schema = pyarrow.schema([("score", pyarrow.float32())])
        self._writer: Any = parquet.ParquetWriter(file, schema)
        self._waiting: list[Scores] = []

    def write(self, scores: Scores) -> None:
        """Append (n,) scores."""
        self._waiting.append(scores)
        if sum(map(len, self._waiting)) >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        column = self._pyarrow.array(np.concatenate(self._waiting))
        self._waiting = []
        self._writer.write_table(self._pyarrow.table({"score": column}))

    def finish(self) -> None:
        """Write the rest, and the file's own index."""
        if self._waiting:
            self._write_group()
        self._writer.close()

    def leave(self) -> None:
        """Keep pyarrow from writing the end into a file that is closed, when it is let go."""
        self._writer.is_open = False


_KINDS: dict[str, Callable[[BinaryIO], ScoreFile]] = {".npy": NpyScores, ".parquet": ParquetScores}


def score_file(name: str, file: BinaryIO) -> ScoreFile:
    """The writer of the kind that the name asks for.

    Args:
        name: of --scores-file.
        file: what it writes to.
    """
    return _KINDS.get(Path(name).suffix, TextScores)(file)


def _import_parquet() -> None:
    from pyarrow import parquet  # noqa: F401


def check_scores_file(name: str) -> None:
    """Raise a UserError if the file cannot be written, before anything is computed."""
    if name == STDOUT:
        if sys.stdout is None:
            raise UserError(f"{FLAG}=-: stdout is closed: send it somewhere, or name a file")
        return
    if Path(name).suffix == ".parquet" and (
        problem := problem_of_import("pyarrow", _import_parquet, REQUIREMENTS)
    ):
        raise UserError(f"{FLAG}={name}: {problem}")
    path = Path(name)
    check_place(f"{FLAG}={name}", path)
    # a rename would replace it; root may write everything, but nobody takes a mark off like that
    is_marked = path.exists() and not path.stat().st_mode & 0o222
    if is_marked or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{FLAG}={name}: the file there is not writable: name another file")
