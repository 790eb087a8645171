"""From categories to ids, as preparation gave them: where the vocabulary is, and the way back.

`find_vocabulary` finds it beside the data, and `VocabularySource.write_beside` puts a copy beside a
model. `IdLookup` turns the categories of new rows into ids; a value that no prepared row had is -1.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.compiled import compiled
from common.errors import UserError
from common.whole_files import link_whole, target_of, write_whole
from criteo.columns import NUM_SPARSE, Columns, Rows
from criteo.original_files import find_dictionaries, read_dictionaries
from criteo.prepared import Prepared
from criteo.spec import DataSpec
from criteo.vocabulary_file import Ints, Vocabulary, blocks_of, digest_of, write_values

FILL = 0.7  # share of a column's slots that are in use: 8 bytes / 0.7 = 11.4 an entry

# ---------------------------------------------------------------- where it is


@dataclass(frozen=True)
class VocabularySource:
    """The vocabulary of data that is there.

    Attributes:
        counts: number of values of each of the 26 columns.
        digest: what `digest_of` returns for its bytes.
        blocks: returns its bytes, a block at a time.
        file: the file that holds them; None if they are in the original's dictionaries.
    """

    counts: tuple[int, ...]
    digest: str
    blocks: Callable[[], Iterable[Any]]
    file: Path | None = None
    _seen: dict[Path, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_file(cls, vocabulary: Vocabulary) -> "VocabularySource":
        """The vocabulary that a file holds."""
        blocks = partial(blocks_of, vocabulary.path)
        return cls(vocabulary.counts, vocabulary.digest, blocks, vocabulary.path)

    def write_beside(self, path: Path) -> None:
        """Make the vocabulary's file at `path`, whole or not at all, unless it is there already.

        It is a hard link to the data's own file where the file system can make one, else a copy.
        A file of another vocabulary is replaced. If `path` is a link, its target is written.

        Raises:
            UserError: the data's own file is damaged.
            OSError: the file cannot be written.
        """
        target = target_of(path)
        if self._is_there(target):
            return
        if self.file is not None:
            Vocabulary(self.file, self.counts, self.digest).check()
            if link_whole(self.file, target):
                return
        try:
            write_whole([(target, self._write)])
        except OSError:
            if not self._is_there(target):  # another run has just written the same one there
                raise

    def _is_there(self, path: Path) -> bool:
        if self.file is not None and path.exists() and os.path.samefile(self.file, path):
            return True
        now = _facts_of(path)
        if now and self._seen.get(path) == now:  # a run saves often, and a copy may have a gigabyte
            return True
        try:
            Vocabulary(path, self.counts, self.digest).check()
        except UserError:
            return False
        self._seen[path] = now
        return True

    def _write(self, file: BinaryIO) -> None:
        if (digest := write_values(file, self.blocks(), self.counts)) != self.digest:
            raise UserError(
                f"the vocabulary of the data changed since the run began (its digest was"
                f" {self.digest}, now it is {digest}): leave the data as it is, and start again"
            )


def _facts_of(path: Path) -> tuple[int, ...]:
    """By what a file is known to be the one that was read; nothing if there is none."""
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def find_vocabulary(spec: DataSpec, prepared: Prepared) -> VocabularySource | None:
    """The vocabulary of prepared data, or None if nobody kept it.

    Data that the original program made, or that was imported from it, has the original's
    dictionaries: `<prefix>_fea_dict_<table>.npz`, beside its other files. They are read once here.

    Args:
        spec: which data it is.
        prepared: the data.

    Raises:
        UserError: a dictionary is missing while others are there, or does not fit the data.
    """
    if vocabulary := prepared.vocabulary:
        return VocabularySource.of_file(vocabulary)
    counts = prepared.counts
    if not prepared.has_original_ids:
        return None
    paths = find_dictionaries(spec.raw, spec.processed, counts)
    if not paths:
        return None
    dictionaries = partial(read_dictionaries, paths, counts)
    return VocabularySource(counts, digest_of(dictionaries(), counts), dictionaries)


# ---------------------------------------------------------------- ids of categories


@compiled
def _slot_of(value: int, slots: Any) -> int:
    """The slot of `value`, or the free one in which it belongs: linear probing from its hash.

    A slot holds the value in its upper 32 bits and id + 1 in the lower ones; a free one is 0.
    """
    size = np.uint64(len(slots))
    # Knuth's multiplicative hash; all in uint64, because numba makes a float of uint64 and int64
    mixed = (np.uint64(np.uint32(value)) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
    slot = np.int64((mixed * size) >> np.uint64(32))
    while slots[slot] != 0 and slots[slot] >> 32 != value:
        slot = slot + 1 if slot + 1 < len(slots) else 0
    return slot


@compiled
def _insert_into_slots(values: Ints, slots: Any) -> int:
    """Give value i the id i; returns the first i whose value is there already, or -1."""
    for i in range(len(values)):
        slot = _slot_of(values[i], slots)
        if slots[slot] != 0:
            return i
        slots[slot] = np.int64(values[i]) << 32 | (i + 1)
    return -1


@compiled
def _insert_into_array(values: Ints, id_of: Ints) -> int:
    """Give value i the id i; returns the first i whose value is there already, or -1."""
    for i in range(len(values)):
        if id_of[values[i]] >= 0:
            return i
        id_of[values[i]] = i
    return -1


@compiled
def _find_in_slots(values: Ints, slots: Any, table: int, ids: Rows) -> None:
    """Fill column `table` of `ids`."""
    for i in range(len(values)):
        ids[i, table] = (slots[_slot_of(values[i], slots)] & 0xFFFFFFFF) - 1


@compiled
def _find_in_array(values: Ints, id_of: Ints, table: int, ids: Rows) -> None:
    """Fill column `table` of `ids`."""
    for i in range(len(values)):
        is_inside = 0 <= values[i] < len(id_of)
        ids[i, table] = id_of[values[i]] if is_inside else -1


class IdLookup:
    """The ids of categories, in memory: at most 12 bytes an entry of the vocabulary.

    A column has an open-addressing map of 8 bytes a slot, or an int32 for each value below
    `max_ind_range` where that takes less. Any number of threads may call `ids` at once; it holds no
    Python lock while it searches.

    Args:
        vocabulary: a file whose `check` has passed; it is read once and then let go.
        max_ind_range: the bound that the categories were taken modulo of, or -1.

    Raises:
        UserError: a column has a value twice, or one that is not below max_ind_range.
    """

    def __init__(self, vocabulary: Vocabulary, max_ind_range: int) -> None:
        self._vocabulary, self._max_ind_range = vocabulary, max_ind_range
        self._columns = [self._make_column(table) for table in range(NUM_SPARSE)]

    def ids(self, categories: Columns) -> Rows:
        """The ids of rows; an unknown value has -1.

        Args:
            categories: (26, n) int32, after the modulo: rows 14 to 39 of the columns that
                criteo.text.parse_lines fills. A slice of some of the rows is not copied.

        Returns:
            (n, 26) int32.
        """
        ids = np.empty((categories.shape[1], NUM_SPARSE), np.int32)
        for table, (find, column) in enumerate(self._columns):
            find(categories[table], column, table, ids)
        return ids

    def _make_column(self, table: int) -> tuple[Callable[..., None], Any]:
        """(the kernel that searches a column, its array)."""
        values, bound = self._vocabulary.values(table), self._max_ind_range
        if 0 < bound <= (largest := int(values.view(np.uint32).max())):
            got = f"the value {largest}, expected values below --max-ind-range={bound}"
            raise self._error(table, got)
        num_slots = int(len(values) / FILL) + 2
        if 0 < bound <= min(2 * num_slots, 2**31):
            find, column = _find_in_array, np.full(bound, -1, np.int32)
            at = _insert_into_array(values, column)
        else:
            find, column = _find_in_slots, np.zeros(num_slots, np.int64)
            at = _insert_into_slots(values, column)
        if at >= 0:
            value = f"the value {int(values[at]) & 0xFFFFFFFF:08x}"
            raise self._error(table, f"{value} twice, the second time for id {at}")
        return find, column

    def _error(self, table: int, got: str) -> UserError:
        return UserError(
            f"{self._vocabulary.path}: column C{table + 1} has {got}:"
            " take the vocabulary of the data that the model was trained with"
        )
