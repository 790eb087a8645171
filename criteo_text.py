"""Criteo's text format at machine speed: parse it, give its categories dense ids, write it.

Numba compiles these loops once and caches them. Polars parses 870,000 rows/s on the two cores where
these loops parse over 2 million, and no data frame engine gives ids in order of first appearance
with a state between pieces (pandas.factorize forgets, np.unique sorts), so the loops are ours. They
hold no Python lock: threads run them side by side.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

DIRECT_RANGE = 1 << 27  # values up to which ids are looked up in a table of all of them
KAGGLE_PARTS = 7  # the original cuts Kaggle's one file into the seven days that it covers
NUM_DENSE = 13
NUM_SPARSE = 26
NUM_FIELDS = 1 + NUM_DENSE + NUM_SPARSE  # label, integers, categories
ROW_BYTES = 4 * NUM_FIELDS  # of a prepared row: int32
FIRST_SPARSE = 1 + NUM_DENSE

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int32]

OK, BAD_LABEL, BAD_NUMBER, OUT_OF_RANGE, BAD_HEX, LONG_HEX, BAD_FIELD_COUNT = range(7)
_TAB, _NEWLINE, _RETURN, _MINUS = 9, 10, 13, 45
_HEX = np.full(256, -1, np.int8)
for _digit in range(16):
    _HEX[ord(f"{_digit:x}")] = _HEX[ord(f"{_digit:X}")] = _digit
_HEX_TEXT = np.frombuffer(b"0123456789abcdef", np.uint8)


def cut_evenly(num_rows: int, num_parts: int) -> list[int]:
    """Rows of each of `num_parts` consecutive parts; the first are one row longer for the rest."""
    return [num_rows // num_parts + (part < num_rows % num_parts) for part in range(num_parts)]


def cut_into_parts(
    pieces: Iterable[Rows], rows_per_part: Sequence[int]
) -> Iterator[tuple[int, Rows]]:
    """(part, rows) of consecutive parts, however the pieces (n, 40) lie across their ends."""
    ends = np.cumsum(rows_per_part)
    row = 0
    for rows in pieces:
        for chunk in np.split(rows, ends[(ends > row) & (ends < row + len(rows))] - row):
            yield int(np.searchsorted(ends, row, side="right")), chunk
            row += len(chunk)


@njit(nogil=True, cache=True)
def _parse_decimal(text: Bytes, start: int, end: int) -> tuple[int, int]:
    """(status, value) of the decimal digits in text[start:end]; empty is 0."""
    at = start + 1 if start < end and text[start] == _MINUS else start
    if at == end and at > start:
        return BAD_NUMBER, 0
    value = 0
    for i in range(at, end):
        digit = text[i] - 48
        if digit < 0 or digit > 9:
            return BAD_NUMBER, 0
        value = value * 10 + digit
        if value > 2**31:
            return OUT_OF_RANGE, 0
    value = -value if at > start else value
    return (OUT_OF_RANGE, 0) if value == 2**31 else (OK, value)


@njit(nogil=True, cache=True)
def _parse_hex(text: Bytes, start: int, end: int) -> tuple[int, int]:
    """(status, value) of up to 8 hexadecimal digits in text[start:end]; empty is 0."""
    value = 0
    for i in range(start, end):
        digit = _HEX[text[i]]
        if digit < 0:
            return BAD_HEX, 0
        value = value * 16 + digit
    return (LONG_HEX, 0) if end - start > 8 else (OK, value)


@njit(nogil=True, cache=True)
def _parse_field(text: Bytes, start: int, end: int, field: int, modulo: int) -> tuple[int, int]:
    """(status, value as it is stored) of one field."""
    if field >= FIRST_SPARSE:
        status, value = _parse_hex(text, start, end)
        value = value % modulo if modulo > 0 else value
        return status, value - 2**32 if value >= 2**31 else value
    status, value = _parse_decimal(text, start, end)
    if field > 0:
        return status, max(value, 0)
    return (BAD_LABEL if status == OK and value != 0 and value != 1 else status), value


@njit(nogil=True, cache=True)
def _field_end(text: Bytes, start: int) -> int:
    """Where the field that begins at `start` ends: at a tab, a line end or the end of the text."""
    for i in range(start, len(text)):
        if text[i] == _TAB or text[i] == _NEWLINE:
            return i
    return len(text)


@njit(nogil=True, cache=True)
def parse_rows(text: Bytes, rows: Rows, modulo: int) -> tuple[int, int, int, int]:
    """Parse whole lines of Criteo text.

    Args:
        text: bytes of whole lines (the last may lack its newline; a carriage return before a
            newline is skipped).
        rows: (lines, 40) int32, filled with label, integers (below 0 become 0), categories.
        modulo: a category becomes its value modulo this if > 0, else the signed number of the
            same 32 bits.

    Returns:
        (rows parsed, status, field, offset): on a status other than OK the field's index and its
        line's first byte.
    """
    start = 0
    num_rows = 0
    while start < len(text):
        line = start
        for field in range(NUM_FIELDS):
            stop = _field_end(text, start)
            at_line_end = stop == len(text) or text[stop] == _NEWLINE
            if at_line_end != (field == NUM_FIELDS - 1):
                return num_rows, BAD_FIELD_COUNT, field, line
            end = stop - 1 if at_line_end and stop > start and text[stop - 1] == _RETURN else stop
            status, value = _parse_field(text, start, end, field, modulo)
            if status != OK:
                return num_rows, status, field, line
            rows[num_rows, field] = value
            start = stop + 1
        num_rows += 1
    return num_rows, OK, 0, 0


def describe_bad_field(status: int, field: int, line: bytes) -> str:
    """Why `parse_rows` refused a line: column (from 1), what it holds, what was expected."""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if status == BAD_FIELD_COUNT:
        return (
            f"{len(fields)} tab-separated fields, expected {NUM_FIELDS}"
            " (label, 13 integers, 26 hex strings)"
        )
    expected = {
        BAD_LABEL: "the label 0 or 1",
        BAD_NUMBER: "a whole number",
        OUT_OF_RANGE: "a whole number of 32 bits",
        BAD_HEX: "hexadecimal digits",
        LONG_HEX: "at most 8 hexadecimal digits",
    }[status]
    got = fields[field].decode("ascii", "backslashreplace")
    return f"column {field + 1}: got {got!r}, expected {expected}"


@njit(nogil=True, cache=True)
def _encode_direct(column: Any, id_of: Any, num_ids: int) -> int:
    """Replace values of `column` by ids; gives the number of ids.

    id_of[value] is the id + 1, 0 where the value was not seen yet.
    """
    for i in range(len(column)):
        value = column[i]
        if id_of[value] == 0:
            num_ids += 1
            id_of[value] = num_ids
        column[i] = id_of[value] - 1
    return num_ids


@njit(nogil=True, cache=True)
def _slot(keys: Any, ids: Any, key: int) -> int:
    """Where `key` is, or would go, in an open-addressing map.

    Knuth's multiplicative hash, linear probing.
    """
    mask = len(keys) - 1
    at = (((key & 0xFFFFFFFF) * 2654435769) >> 7) & mask
    while ids[at] != 0 and keys[at] != key:
        at = (at + 1) & mask
    return at


@njit(nogil=True, cache=True)
def _encode_hashed(column: Any, keys: Any, ids: Any, num_ids: int) -> tuple[int, int]:
    """As `_encode_direct`, through a map; gives (values done, number of ids).

    Stops before the map is over half full.
    """
    for i in range(len(column)):
        key = column[i]
        at = _slot(keys, ids, key)
        if ids[at] == 0:
            if 2 * num_ids >= len(keys):
                return i, num_ids
            num_ids += 1
            keys[at] = key
            ids[at] = num_ids
        column[i] = ids[at] - 1
    return len(column), num_ids


@njit(nogil=True, cache=True)
def _rehash(keys: Any, ids: Any, new_keys: Any, new_ids: Any) -> None:
    for i in range(len(keys)):
        if ids[i] != 0:
            at = _slot(new_keys, new_ids, keys[i])
            new_keys[at] = keys[i]
            new_ids[at] = ids[i]


class IdMap:
    """Dense ids 0, 1, 2, ... of a column's values in order of first appearance, over all pieces.

    Args:
        max_ind_range: > 0: values lie in [0, max_ind_range), and up to DIRECT_RANGE ids lie in a
            table of int32 that the system hands out page by page. Else values are any int32 and
            the map grows with their number (16 bytes a value).
    """

    def __init__(self, max_ind_range: int) -> None:
        self.num_ids = 0
        self._bounded = 0 < max_ind_range <= DIRECT_RANGE
        self._ids = np.zeros(max_ind_range if self._bounded else 1024, np.int32)
        self._keys = np.zeros(0 if self._bounded else 1024, np.int32)

    def encode(self, column: Rows) -> None:
        """Replace the values of `column` (n,) by their ids, in place."""
        if self._bounded:
            self.num_ids = _encode_direct(column, self._ids, self.num_ids)
            return
        done = 0
        while done < len(column):
            step, self.num_ids = _encode_hashed(column[done:], self._keys, self._ids, self.num_ids)
            done += step
            if done < len(column):
                self._grow()

    def _grow(self) -> None:
        keys, ids = np.zeros(2 * len(self._keys), np.int32), np.zeros(2 * len(self._ids), np.int32)
        _rehash(self._keys, self._ids, keys, ids)
        self._keys, self._ids = keys, ids


@njit(nogil=True, cache=True)
def _write_decimal(value: int, text: Bytes, at: int) -> int:
    if value < 0:
        text[at] = _MINUS
        at += 1
        value = -value
    digits = 1
    bound = 10
    while value >= bound:
        digits += 1
        bound *= 10
    for i in range(at + digits - 1, at - 1, -1):
        text[i] = 48 + value % 10
        value //= 10
    return at + digits


@njit(nogil=True, cache=True)
def _write_hex(value: int, text: Bytes, at: int) -> int:
    for shift in range(28, -1, -4):
        text[at] = _HEX_TEXT[(value >> shift) & 15]
        at += 1
    return at


@njit(nogil=True, cache=True)
def write_rows(numbers: Any, categories: Any, missing: Any, text: Bytes) -> int:
    """Write rows as Criteo text.

    Args:
        numbers: (n, 14) int64: label and integers.
        categories: (n, 26) uint32.
        missing: (n, 40) bool: fields to leave empty.
        text: bytes to fill, 400 a row always suffice.

    Returns:
        The bytes written.
    """
    at = 0
    for row in range(len(numbers)):
        for field in range(NUM_FIELDS):
            if missing[row, field]:
                pass
            elif field < FIRST_SPARSE:
                at = _write_decimal(numbers[row, field], text, at)
            else:
                at = _write_hex(categories[row, field - FIRST_SPARSE], text, at)
            text[at] = _TAB
            at += 1
        text[at - 1] = _NEWLINE
    return at
