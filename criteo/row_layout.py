"""How a row of 40 columns lies in bytes: each column in the smallest integer type that holds it.

Columns of 4 bytes come first, then those of 2, then those of 1, each in the order label, I1 to I13,
C1 to C26, without gaps; little-endian; 1 and 2 bytes are unsigned, 4 are signed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled
from criteo.columns import (
    FIRST_SPARSE,
    NAMES,
    NUM_DENSE,
    NUM_FIELDS,
    NUM_SPARSE,
    Bytes,
    Columns,
    Rows,
)

_TYPES = {1: "|u1", 2: "<u2", 4: "<i4"}


@dataclass(frozen=True)
class Layout:
    """Bytes of each column (1, 2 or 4), in the order label, integers, categories."""

    widths: tuple[int, ...]

    @classmethod
    def holding(cls, largest: Sequence[int]) -> "Layout":
        """The narrowest rows for values from 0 to `largest` (40,)."""
        return cls(tuple(1 if most < 2**8 else 2 if most < 2**16 else 4 for most in largest))

    @classmethod
    def from_columns(cls, columns: Sequence[Sequence[str]]) -> "Layout":
        """The layout whose `columns` these are.

        Raises:
            ValueError, KeyError, TypeError: they are not a layout's.
        """
        widths = {name: np.dtype(kind).itemsize for name, kind in columns}
        layout = cls(tuple(widths[name] for name in NAMES))
        if layout.columns != [list(column) for column in columns]:
            raise ValueError(f"columns {columns}")
        return layout

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """(40,) columns as they lie in a row."""
        return np.argsort(-np.array(self.widths), kind="stable")

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(40,) first byte of each column in a row."""
        ends = np.cumsum(np.array(self.widths)[self.order])
        offsets = np.empty(NUM_FIELDS, np.int64)
        offsets[self.order] = np.concatenate([[0], ends[:-1]])
        return offsets

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self.widths)

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """(width, first byte, end) of the columns of each width that there is."""
        ends = np.cumsum([width * self.widths.count(width) for width in (4, 2, 1)]).tolist()
        found = zip((4, 2, 1), [0, *ends], ends, strict=False)
        return [(width, begin, end) for width, begin, end in found if end > begin]

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Columns 0 to 39 in order as stretches of one width: (width, begin, end) within it."""
        runs: list[tuple[int, int, int]] = []
        seen = {4: 0, 2: 0, 1: 0}
        for width in self.widths:
            begin = runs.pop()[1] if runs and runs[-1][0] == width else seen[width]
            seen[width] += 1
            runs.append((width, begin, seen[width]))
        return runs

    @property
    def columns(self) -> list[list[str]]:
        """[name, type] of each column as it lies in a row: what numpy.dtype takes as tuples."""
        return [[NAMES[column], _TYPES[self.widths[column]]] for column in self.order]

    @cached_property
    def _places(self) -> Any:
        """What the kernels take: columns as they lie, how many have 4 bytes, how many 4 or 2."""
        widths = np.array(self.widths)
        return self.order.astype(_U), int((widths == 4).sum()), int((widths >= 2).sum())

    def pack(self, columns: Columns) -> Bytes:
        """Columns (40, n) int32 as rows (n, row_bytes)."""
        rows = np.empty((columns.shape[1], self.row_bytes), np.uint8)
        _pack(columns, self._places, rows)
        return rows

    def unpack(self, rows: Bytes) -> Rows:
        """Rows (n, row_bytes) as int32 (n, 40)."""
        unpacked = np.empty((len(rows), NUM_FIELDS), np.int32)
        _unpack(rows, self._places, unpacked)
        return unpacked

    def decode(self, rows: Bytes) -> tuple[Any, Any, Any]:
        """Integers (n, 13) float32, ids (n, 26) int64, labels (n, 1) float32 of rows."""
        dense = np.empty((len(rows), NUM_DENSE), np.float32)
        ids = np.empty((len(rows), NUM_SPARSE), np.int64)
        label = np.empty((len(rows), 1), np.float32)
        _decode(rows, self._places, dense, ids, label)
        return dense, ids, label

    def find_outside(self, rows: Bytes, counts: Sequence[int]) -> tuple[int, int, int] | None:
        """(row, table, id) of the first id that is not below its table's count, if there is one."""
        last = np.array([*[2**32 - 1] * FIRST_SPARSE, *(count - 1 for count in counts)], np.uint32)
        row = int(_find_outside(rows, last[self.order], self._places))
        if row < 0:
            return None
        ids = self.unpack(rows[row : row + 1])[0, FIRST_SPARSE:]
        table = int(np.flatnonzero((ids < 0) | (ids >= np.array(counts)))[0])
        return row, table, int(ids[table])

    def repack(self, rows: Bytes, ids: Sequence[Any] | None, to: "Layout", places: Any) -> Bytes:
        """Rows (n, row_bytes) in another layout and order, categories translated.

        Args:
            rows: to be taken.
            ids: of each of the 26 columns: ids[c][v] (int32) is what v becomes; None: v stays.
            to: layout of the result.
            places: (n,) where each row goes.

        Returns:
            (n, to.row_bytes).
        """
        tables = [np.zeros(0, np.int32)] * NUM_SPARSE if ids is None else ids
        begins = np.cumsum([0, *(len(table) for table in tables)])
        flat = np.concatenate(tables)
        repacked = np.empty((len(rows), to.row_bytes), np.uint8)
        _repack(rows, self._places, (flat, begins), to._places, places, repacked)
        return repacked


FLAT = Layout((4,) * NUM_FIELDS)  # the original's flat files: int32 in the order of the columns


# Unsigned places need no test for negative indices, with which loads would not become one word's:
# three times as fast.
_U = np.uint64


@compiled
def _four(row: Any, at: Any) -> Any:
    low = np.uint32(row[at]) | np.uint32(row[at + _U(1)]) << np.uint32(8)
    high = np.uint32(row[at + _U(2)]) << np.uint32(16) | np.uint32(row[at + _U(3)]) << np.uint32(24)
    return low | high


@compiled
def _two(row: Any, at: Any) -> Any:
    return np.uint32(row[at]) | np.uint32(row[at + _U(1)]) << np.uint32(8)


@compiled
def _load(row: Any, layout: Any, values: Any) -> None:
    """The row's values by column; the first `fours` columns of `order` have 4 bytes, and so on."""
    order, fours, twos = layout
    for k in range(fours):
        values[order[k]] = np.int32(_four(row, _U(4 * k)))
    begin = 2 * fours
    for k in range(fours, twos):
        values[order[k]] = _two(row, _U(begin + 2 * k))
    begin = 2 * fours + twos
    for k in range(twos, NUM_FIELDS):
        values[order[k]] = row[_U(begin + k)]


@compiled
def _store(values: Any, layout: Any, row: Any) -> None:
    """Values (40,) by column as a row."""
    order, fours, twos = layout
    for k in range(fours):
        value, at = values[order[k]], _U(4 * k)
        row[at] = value & 255
        row[at + _U(1)] = (value >> 8) & 255
        row[at + _U(2)] = (value >> 16) & 255
        row[at + _U(3)] = (value >> 24) & 255
    begin = 2 * fours
    for k in range(fours, twos):
        value, at = values[order[k]], _U(begin + 2 * k)
        row[at] = value & 255
        row[at + _U(1)] = (value >> 8) & 255
    begin = 2 * fours + twos
    for k in range(twos, NUM_FIELDS):
        row[_U(begin + k)] = values[order[k]] & 255


@compiled
def _pack(columns: Any, layout: Any, rows: Any) -> None:
    for i in range(len(rows)):
        _store(columns[:, i], layout, rows[i])


@compiled
def _unpack(rows: Any, layout: Any, unpacked: Any) -> None:
    for i in range(len(rows)):
        _load(rows[i], layout, unpacked[i])


@compiled
def _repack(rows: Any, old: Any, tables: Any, new: Any, places: Any, repacked: Any) -> None:
    ids, begins = tables
    values = np.empty(NUM_FIELDS, np.int64)
    for i in range(len(rows)):
        _load(rows[i], old, values)
        if len(ids) > 0:
            for table in range(NUM_SPARSE):
                place = begins[table] + values[FIRST_SPARSE + table]
                values[FIRST_SPARSE + table] = ids[_U(place)]
        _store(values, new, repacked[places[i]])


@compiled
def _decode(rows: Any, layout: Any, dense: Any, ids: Any, label: Any) -> None:
    values = np.empty(NUM_FIELDS, np.int64)
    for i in range(len(rows)):
        _load(rows[i], layout, values)
        label[i, 0] = values[0]
        for k in range(NUM_DENSE):
            dense[i, k] = values[1 + k]
        for k in range(NUM_SPARSE):
            ids[i, k] = values[FIRST_SPARSE + k]


@compiled
def _find_outside(rows: Any, last: Any, layout: Any) -> int:
    """The first row with a value above its column's `last` (uint32, in the row's order), or -1."""
    _, fours, twos = layout
    for i in range(len(rows)):
        row, outside = rows[i], False
        for k in range(fours):
            outside |= _four(row, _U(4 * k)) > last[k]
        begin = 2 * fours
        for k in range(fours, twos):
            outside |= _two(row, _U(begin + 2 * k)) > last[k]
        begin = 2 * fours + twos
        for k in range(twos, NUM_FIELDS):
            outside |= row[_U(begin + k)] > last[k]
        if outside:
            return i
    return -1
