"""Rows of 40 columns packed into bytes: each column has the narrowest integer type that holds it.

The columns of 4 bytes come first, then those of 2, then those of 1, each in the order label, I1 to
I13, C1 to C26, without gaps. All are little-endian; 1 and 2 bytes are unsigned, 4 are signed.
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

TYPES = {1: "|u1", 2: "<u2", 4: "<i4"}

# Offsets are unsigned in the kernels: without a test for negative indices numba loads a column as
# one word, which is three times as fast.
_U = np.uint64


@dataclass(frozen=True)
class Layout:
    """The types of a packed row's columns.

    Attributes:
        widths: bytes of each column (1, 2 or 4), in the order label, integers, categories.
    """

    widths: tuple[int, ...]

    @classmethod
    def holding(cls, largest: Sequence[int]) -> "Layout":
        """The narrowest layout for columns with values from 0 to `largest` (40,)."""
        return cls(tuple(1 if most < 2**8 else 2 if most < 2**16 else 4 for most in largest))

    @classmethod
    def from_columns(cls, columns: Sequence[Sequence[str]]) -> "Layout":
        """The layout that has these `columns`, as they were read from JSON.

        Raises:
            ValueError, KeyError, TypeError: no layout has them.
        """
        widths = {name: np.dtype(kind).itemsize for name, kind in columns}
        layout = cls(tuple(widths[name] for name in NAMES))
        if layout.columns != [list(column) for column in columns]:
            raise ValueError("columns are not in the order of their widths")
        return layout

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """(40,) numbers of the columns, in their order within a row."""
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
        """Number of bytes of a row."""
        return sum(self.widths)

    @cached_property
    def width_groups(self) -> list[tuple[int, int, int]]:
        """(width, first byte, end) within a row, for the columns of each width in use."""
        ends = np.cumsum([width * self.widths.count(width) for width in (4, 2, 1)]).tolist()
        groups = zip((4, 2, 1), [0, *ends], ends, strict=False)
        return [(width, begin, end) for width, begin, end in groups if end > begin]

    @cached_property
    def stretches(self) -> list[tuple[int, int, int]]:
        """Columns 0 to 39 in order, as stretches of neighbouring columns of one width.

        Returns:
            (width, begin, end) of each stretch; columns are counted within their width's group.
        """
        stretches: list[tuple[int, int, int]] = []
        seen = {4: 0, 2: 0, 1: 0}
        for width in self.widths:
            goes_on = bool(stretches) and stretches[-1][0] == width
            begin = stretches.pop()[1] if goes_on else seen[width]
            seen[width] += 1
            stretches.append((width, begin, seen[width]))
        return stretches

    @property
    def columns(self) -> list[list[str]]:
        """[name, type] of each column in its order within a row, for JSON and numpy.dtype.

        The names and types are frozen: meta.json of prepared data keeps them.
        """
        return [[NAMES[column], TYPES[self.widths[column]]] for column in self.order]

    @cached_property
    def _kernel_layout(self) -> Any:
        """The kernels' `layout`: (order, number of columns of 4 bytes, number of 4 or 2 bytes)."""
        widths = np.array(self.widths)
        return self.order.astype(_U), int((widths == 4).sum()), int((widths >= 2).sum())

    def pack(self, columns: Columns) -> Bytes:
        """Columns (40, n) int32 packed as rows (n, row_bytes)."""
        rows = np.empty((columns.shape[1], self.row_bytes), np.uint8)
        _pack(columns, self._kernel_layout, rows)
        return rows

    def unpack(self, rows: Bytes) -> Rows:
        """Rows (n, row_bytes) unpacked as int32 (n, 40)."""
        unpacked = np.empty((len(rows), NUM_FIELDS), np.int32)
        _unpack(rows, self._kernel_layout, unpacked)
        return unpacked

    def decode(self, rows: Bytes) -> tuple[Any, Any, Any]:
        """Rows (n, row_bytes) as numbers for a model.

        Returns:
            (integers (n, 13) float32, ids (n, 26) int64, labels (n, 1) float32).
        """
        dense = np.empty((len(rows), NUM_DENSE), np.float32)
        ids = np.empty((len(rows), NUM_SPARSE), np.int64)
        label = np.empty((len(rows), 1), np.float32)
        _decode(rows, self._kernel_layout, dense, ids, label)
        return dense, ids, label

    def first_fault(self, rows: Bytes, counts: Sequence[int]) -> tuple[int, str] | None:
        """The first row with a label other than 0 and 1, or with an id outside its table.

        Args:
            rows: (n, row_bytes).
            counts: rows of each of the 26 tables.

        Returns:
            (row, what is wrong with it), or None if no row is wrong.
        """
        most = [1, *[2**32 - 1] * NUM_DENSE, *(count - 1 for count in counts)]
        last = np.array(most, np.uint32)
        row = int(_first_row_outside(rows, last[self.order], self._kernel_layout))
        if row < 0:
            return None
        label, *values = self.unpack(rows[row : row + 1])[0].tolist()
        if label not in (0, 1):
            return row, f"label {label} is neither 0 nor 1"
        ids = np.array(values[NUM_DENSE:])
        table = int(np.flatnonzero((ids < 0) | (ids >= np.array(counts)))[0])
        return row, f"id {ids[table]} of table {table} is outside its {counts[table]} rows"

    def repack(self, rows: Bytes, ids: Sequence[Any] | None, to: "Layout", positions: Any) -> Bytes:
        """Rows in another layout and another order, with categories replaced by ids.

        Args:
            rows: (n, row_bytes).
            ids: 26 arrays of int32: category v of column c becomes ids[c][v]; None: it remains v.
            to: layout of the result.
            positions: (n,) number of each row in the result.

        Returns:
            (n, to.row_bytes).
        """
        tables = [np.zeros(0, np.int32)] * NUM_SPARSE if ids is None else ids
        begins = np.cumsum([0, *(len(table) for table in tables)])
        flat = np.concatenate(tables)
        repacked = np.empty((len(rows), to.row_bytes), np.uint8)
        _repack(rows, self._kernel_layout, (flat, begins), to._kernel_layout, positions, repacked)
        return repacked


FLAT = Layout((4,) * NUM_FIELDS)  # the original's flat files: int32 in the order of the columns


# ---------------------------------------------------------------- kernels
#
# A kernel's `layout` is (order, fours, twos): the columns in their order within a row; the first
# `fours` of them have 4 bytes, the others before `twos` have 2, the rest 1.


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
    """Write the row's 40 numbers to `values`, by column."""
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
    """Write `values` (40,), by column, to the row."""
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
def _repack(rows: Any, old: Any, tables: Any, new: Any, positions: Any, repacked: Any) -> None:
    ids, begins = tables
    values = np.empty(NUM_FIELDS, np.int64)
    for i in range(len(rows)):
        _load(rows[i], old, values)
        if len(ids) > 0:
            for table in range(NUM_SPARSE):
                index = begins[table] + values[FIRST_SPARSE + table]
                values[FIRST_SPARSE + table] = ids[_U(index)]
        _store(values, new, repacked[positions[i]])


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
def _first_row_outside(rows: Any, last: Any, layout: Any) -> int:
    """The number of the first row with a value above its column's `last`, or -1 if none has one.

    Args:
        rows: (n, row_bytes).
        last: (40,) uint32 in the columns' order within a row.
        layout: the rows' layout.
    """
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
