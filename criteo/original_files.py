"""Files that the original program left: find them, check them, read them a block at a time.

    <processed>.npz                       X_int, X_cat, y, counts: all rows in file order
    <raw>_<d>_reordered.npz               X_int, X_cat, y of day d, shuffled already
    <processed>_{train,test,val}.bin      int32 rows of label, 13 integers, 26 ids
    <raw>_fea_count.npz                   counts: rows of each table, for the two forms above
    <raw>_day_count.npz                   total_per_file: rows of each part
    <raw>_fea_dict_<table>.npz            unique: the category of id 0, 1, 2, ...; may be missing

The arrays hold integers clipped at 0 and ids instead of categories, in any numeric type. Each of
the 26 ids belongs to a table; a part is a day, or a seventh of Kaggle's one file.
"""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE, KAGGLE_PARTS, NUM_DENSE, NUM_SPARSE, Rows
from criteo.row_layout import FLAT

ROWS_PER_BLOCK = 1 << 17  # rows of an npz that are in memory at a time
_DAMAGES = (  # what zipfile and numpy raise for files that are damaged or of another kind
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, SyntaxError),
    *(RuntimeError, ArithmeticError, MemoryError, zipfile.BadZipFile, zlib.error, struct.error),
)
_WIDTHS = {"y": 1, "X_int": NUM_DENSE, "X_cat": NUM_SPARSE}


Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Original:
    """The npz files that the original made of one data set.

    Attributes:
        files: one for all rows, or one for each day.
        counts: rows of each table.
        rows_per_part: rows of each part.
        shuffled: whether the rows of each day are shuffled already.
        dictionaries: what `find_dictionaries` returns.
    """

    files: list[Path]
    counts: tuple[int, ...]
    rows_per_part: tuple[int, ...]
    shuffled: bool
    dictionaries: tuple[Path, ...]


def find_original(raw: Path, processed: Path, mapped: bool) -> Original | None:
    """The original's npz files for `raw` or `processed`, or None if there are none.

    Args:
        raw: the raw data, as in DataSpec.
        processed: the prepared data, as in DataSpec.
        mapped: whether training maps its rows; the files of single days are used only then.

    Raises:
        UserError: a file is not what the original writes.
    """
    if mapped and (days := _find_days(raw)):
        rows, counts = tuple(_num_rows(day) for day in days), _read_counts(raw, processed)
        return Original(days, counts, rows, True, find_dictionaries(raw, processed, counts))
    whole = processed if processed.suffix == ".npz" else Path(f"{processed}.npz")
    if not whole.is_file():
        return None
    counts = _read_numbers(whole, "counts", 1, NUM_SPARSE)
    dictionaries = find_dictionaries(raw, processed, counts)
    return Original([whole], counts, _rows_per_part(whole, raw), False, dictionaries)


def find_flat_files(
    raw: Path, processed: Path, stem: Path
) -> tuple[dict[str, Path], tuple[int, ...], int, int] | None:
    """The original's flat files, or None if one of the three is missing.

    Returns:
        (file of each split, rows of each table, number of training rows, number of others).
    """
    for prefix in (processed, stem):
        files = {split: Path(f"{prefix}_{split}.bin") for split in ("train", "test", "val")}
        if all(path.is_file() for path in files.values()):
            rows = {split: _flat_rows(path) for split, path in files.items()}
            return files, _read_counts(raw, processed), rows["train"], rows["test"] + rows["val"]
    return None


def _flat_rows(path: Path) -> int:
    rows, rest = divmod(path.stat().st_size, FLAT.row_bytes)
    if rest:
        raise UserError(
            f"{path} is damaged: {path.stat().st_size} bytes are no whole rows of {FLAT.row_bytes}"
        )
    return rows


def read_original(original: Original) -> Iterator[tuple[int, Rows]]:
    """(part, rows) in order, a block at a time; rows (n, 40) int32 as in prepared data.

    Raises:
        UserError: a file is damaged, or an id is outside its table.
    """
    if len(original.files) > 1:
        for part, path in enumerate(original.files):
            for rows in _read_file(path, original.counts):
                yield part, rows
        return
    yield from _cut_into_parts(
        _read_file(original.files[0], original.counts), original.rows_per_part
    )


def _cut_into_parts(
    blocks: Iterable[Rows], rows_per_part: Sequence[int]
) -> Iterator[tuple[int, Rows]]:
    """(part, rows) of consecutive parts; blocks (n, 40) may extend over the ends of parts."""
    ends = np.cumsum(rows_per_part)
    row = 0
    for block in blocks:
        for rows in np.split(block, ends[(ends > row) & (ends < row + len(block))] - row):
            yield int(np.searchsorted(ends, row, side="right")), rows
            row += len(rows)


def _prefixes(raw: Path) -> list[Path]:
    """The beginnings of the original's file names beside a raw file.

    The original cuts `.txt` off, and appends `_day` for Kaggle.
    """
    bare = raw.with_suffix("") if raw.suffix == ".txt" else raw
    return [raw, bare, bare.with_name(bare.name + "_day")]


def _find_days(raw: Path) -> list[Path]:
    for prefix in _prefixes(raw):
        days: list[Path] = []
        while (path := Path(f"{prefix}_{len(days)}_reordered.npz")).is_file():
            days.append(path)
        if len(days) > 1:
            return days
    return []


def _all_prefixes(raw: Path, processed: Path) -> list[Path]:
    """The beginnings of file names beside prepared data, and then those beside a raw file."""
    bare = processed.with_suffix("") if processed.suffix == ".npz" else processed
    return [processed, bare, *_prefixes(raw)]


def _read_counts(raw: Path, processed: Path) -> tuple[int, ...]:
    for prefix in _all_prefixes(raw, processed):
        path = Path(f"{prefix}_fea_count.npz")
        if path.is_file():
            return _read_numbers(path, "counts", 1, NUM_SPARSE)
    raise UserError(
        f"{raw}_fea_count.npz: no such file; it holds the rows of each table (counts): get it from"
        " where the data was made, or delete the files of rows to have the text prepared instead"
    )


def _read_numbers(path: Path, name: str, least: int, size: int | None = None) -> tuple[int, ...]:
    """An array of `size` (None: any number of) whole numbers from `least` to 2^31.

    Raises:
        UserError: the file has no such array.
    """
    with _readable(path), np.load(path, allow_pickle=False) as arrays:
        array = np.asarray(arrays[name])
    expected = f"expected {size or 'a list of'} whole numbers from {least} to 2^31"
    if array.dtype.kind not in "iuf" or array.ndim != 1 or len(array) != (size or len(array)):
        got = f"shape {array.shape} and type {array.dtype}"
        raise UserError(f"{path}: {name} has {got}, {expected}")
    is_right = (array >= least) & (array <= 2**31) & (np.floor(array) == array)
    if not is_right.all():
        at = int(np.argmin(is_right))
        raise UserError(f"{path}: {name}[{at}] is {array[at]}, {expected}")
    return tuple(int(number) for number in array)


def _rows_per_part(whole: Path, raw: Path) -> tuple[int, ...]:
    rows = _num_rows(whole)
    for prefix in _prefixes(raw):
        path = Path(f"{prefix}_day_count.npz")
        if path.is_file():
            parts = _read_numbers(path, "total_per_file", 0)
            if sum(parts) != rows:
                raise UserError(
                    f"{path}: total_per_file adds up to {sum(parts)}, {whole} has {rows} rows"
                )
            return parts
    if "terabyte" in whole.name:
        raise UserError(
            f"{raw}_day_count.npz: no such file; it holds the rows of each day of {whole}"
        )
    return tuple(split_evenly(rows, KAGGLE_PARTS))


@contextlib.contextmanager
def _readable(
    path: Path, what_to_do: str = "make it again, or delete it to have the text prepared instead"
) -> Iterator[None]:
    """Turn an error inside the block into a UserError about `path`."""
    try:
        yield
    except _DAMAGES as error:
        raise UserError(
            f"{path} is not an npz that the original writes ({error}): {what_to_do}"
        ) from error


def _num_rows(path: Path) -> int:
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open("y.npy") as file:
        rows = int(_header(file)[0][0])
        if rows < 1:
            raise ValueError(f"y has {rows} rows")
        return rows


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, column-major, type) of an npy file; the file is left at its first value."""
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, column_major, dtype = read_header(file)
    if dtype.kind not in "iuf":
        raise ValueError(f"an array has type {dtype}, expected whole numbers")
    return shape, column_major, dtype


def _read_file(path: Path, counts: tuple[int, ...]) -> Iterator[Rows]:
    """The rows of one npz in blocks (n, 40); its three arrays are read side by side."""
    row = 0
    with _readable(path), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        columns = [
            _blocks(stack.enter_context(archive.open(f"{name}.npy")), _WIDTHS[name])
            for name in _WIDTHS
        ]
        for blocks in zip(*columns, strict=True):
            rows = np.concatenate(blocks, axis=1)
            integers = rows[:, 1:FIRST_SPARSE]
            np.maximum(integers, 0, out=integers)  # as preparation makes them of text
            _check_rows(path, row, rows, counts)
            row += len(rows)
            yield rows


def _blocks(file: IO[bytes], width: int) -> Iterator[Rows]:
    """The rows (n, width) of an npy file in blocks, as int32."""
    shape, column_major, dtype = _header(file)
    num_rows = shape[0]
    if int(np.prod(shape)) != num_rows * width:
        raise ValueError(f"an array has shape {shape}, expected {width} columns")
    begins = range(0, num_rows, ROWS_PER_BLOCK)
    if column_major and width > 1:  # a row's values are spread over the whole file
        whole = np.frombuffer(file.read(), dtype).reshape(width, num_rows).T
        yield from (_as_ints(whole[begin : begin + ROWS_PER_BLOCK], begin) for begin in begins)
        return
    for begin in begins:
        size = min(ROWS_PER_BLOCK, num_rows - begin)
        block = np.frombuffer(_read_exactly(file, size * width * dtype.itemsize), dtype)
        yield _as_ints(block.reshape(size, width), begin)


def _as_ints(values: npt.NDArray[Any], first_row: int) -> Rows:
    """Numbers (n, width) of any type as int32."""
    with np.errstate(invalid="ignore"):
        ints = values.astype(np.int32)
    if (wrong := ints != values).any():
        row, column = (int(at[0]) for at in np.nonzero(wrong))
        got = f"{values[row, column]} in row {first_row + row}"
        raise ValueError(f"{got} is not a whole number of 32 bits")
    return ints


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError("it ends early")
    return content


def _check_rows(path: Path, first_row: int, rows: Rows, counts: tuple[int, ...]) -> None:
    """Raise a UserError that names the first row with a label or an id that cannot be."""
    packed = np.ascontiguousarray(rows).view(np.uint8)
    if fault := FLAT.first_fault(packed, counts):
        raise UserError(f"{path}, row {first_row + fault[0]}: {fault[1]}")


# ---------------------------------------------------------------- the values of ids

_WITHOUT = "get it from where the data was made, or delete all 26 to go on without a vocabulary"


def find_dictionaries(raw: Path, processed: Path, counts: Sequence[int]) -> tuple[Path, ...]:
    """The files of the categories that ids stand for, one a table, or () if there are none.

    Args:
        raw: the raw data, as in DataSpec.
        processed: the prepared data, as in DataSpec.
        counts: rows of each table.

    Raises:
        UserError: some of them are missing, or one holds another number of values.
    """
    for prefix in _all_prefixes(raw, processed):
        paths = tuple(Path(f"{prefix}_fea_dict_{table}.npz") for table in range(NUM_SPARSE))
        missing = [path for path in paths if not path.is_file()]
        if len(missing) == NUM_SPARSE:
            continue
        if missing:
            raise UserError(f"{missing[0]}: no such file, but others of its kind: {_WITHOUT}")
        for path, count in zip(paths, counts, strict=True):
            with _dictionary(path, count):
                pass
        return paths
    return ()


def read_dictionaries(paths: Sequence[Path], counts: Sequence[int]) -> Iterator[Ints]:
    """(n,) int32 for each table: the category of id 0, 1, 2, ... as the number of its 32 bits.

    Args:
        paths: what `find_dictionaries` returned.
        counts: rows of each table.

    Raises:
        UserError: a file is damaged, or its values are not distinct ones of 32 bits.
    """
    for path, count in zip(paths, counts, strict=True):
        values = np.empty(count, np.int32)
        with _dictionary(path, count) as (file, dtype):
            for begin in range(0, count, ROWS_PER_BLOCK):
                size = min(ROWS_PER_BLOCK, count - begin)
                block = np.frombuffer(_read_exactly(file, size * dtype.itemsize), dtype)
                values[begin : begin + size] = _as_32_bits(block, begin)
            _check_distinct(values)
        yield values


@contextlib.contextmanager
def _dictionary(path: Path, count: int) -> Iterator[tuple[IO[bytes], np.dtype[Any]]]:
    """(file at its first value, type of a value) of a dictionary of `count` values.

    Raises:
        UserError: it is no such file, or the block finds something wrong with it.
    """
    with _readable(path, _WITHOUT), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = names[0] if len(names) == 1 else "unique.npy"
        with archive.open(name) as file:
            shape, _, dtype = _header(file)
            if shape != (count,):
                raise ValueError(f"{name} has shape {shape}, expected ({count},)")
            yield file, dtype


def _as_32_bits(values: npt.NDArray[Any], first_id: int) -> Ints:
    """Numbers (n,) of any type, signed or not, as int32 of the same 32 bits."""
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    wrong = (whole != values) | (whole < -(2**31)) | (whole >= 2**32)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"{values[at]} of id {first_id + at} is not a whole number of 32 bits")
    return whole.astype(np.uint32).view(np.int32)


def _check_distinct(values: Ints) -> None:
    in_order = np.sort(values)
    if (again := in_order[1:] == in_order[:-1]).any():
        value = int(in_order[int(np.argmax(again))])
        first, second = np.flatnonzero(values == value)[:2]
        raise ValueError(f"ids {first} and {second} have the same value {value}")
