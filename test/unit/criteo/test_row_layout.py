"""Rows of bytes: what is packed is what is read, whoever reads it."""

import json

import numpy as np
import pytest
import torch

from criteo.columns import NAMES
from criteo.row_layout import FLAT, Layout
from model.batch import _unpacked

TOP = {1: 2**8 - 1, 2: 2**16 - 1, 4: 2**31 - 1}
CRITEO_TABLES = (
    "10000000-32448-15529-7289-19879-3-6611-1384-62-10000000-1262224-284369-10-2208-10424-89-4-963"
    "-14-10000000-6919756-10000000-397757-11440-103-35"
)


def random_layout(seed, widths=(1, 2, 4)):
    """Columns of random widths, of one alone where the seed is small."""
    random = np.random.default_rng(seed)
    if seed < 3:
        widths = (widths[seed % len(widths)],)
    return Layout(tuple(random.choice(widths, 40).tolist()))


def random_columns(layout, num_rows, seed, negative=True):
    """(40, n) int32 that the layout holds: both ends of what each column can be, and between."""
    random = np.random.default_rng(seed)
    columns = np.empty((40, num_rows), np.int32)
    for column, width in enumerate(layout.widths):
        low = -(2**31) if width == 4 and negative else 0
        values = random.integers(low, TOP[width] + 1, num_rows)
        ends = random.choice([low, low + 1, 0, 1, 127, 128, TOP[width] - 1, TOP[width]], num_rows)
        columns[column] = np.where(random.random(num_rows) < 0.5, values, ends)
    return columns


def as_numpy(layout, rows):
    """(n, 40) of packed rows as numpy reads them by the names and types of the columns."""
    dtype = np.dtype([tuple(column) for column in layout.columns])
    assert dtype.itemsize == layout.row_bytes
    records = np.ascontiguousarray(rows).reshape(-1).view(dtype)
    return np.stack([records[name].astype(np.int32) for name in NAMES], axis=1)


layouts = pytest.mark.parametrize("seed", range(12))


@layouts
def test_what_is_packed_is_unpacked(seed):
    """By the module and by numpy's structured types."""
    layout = random_layout(seed)
    columns = random_columns(layout, 100, seed)
    rows = layout.pack(columns)
    assert rows.shape == (100, layout.row_bytes) and rows.dtype == np.uint8
    np.testing.assert_array_equal(layout.unpack(rows), columns.T)
    np.testing.assert_array_equal(as_numpy(layout, rows), columns.T)


@layouts
def test_rows_in_the_middle_of_a_mapped_file_are_unpacked(seed, tmp_path):
    """Rows at any address, read-only, and none at all."""
    layout = random_layout(seed)
    columns = random_columns(layout, 20, seed)
    (tmp_path / "rows").write_bytes(layout.pack(columns).tobytes())
    rows = np.memmap(tmp_path / "rows", np.uint8, mode="r").reshape(-1, layout.row_bytes)
    for begin, end in ((0, 20), (1, 2), (7, 20), (3, 3)):
        np.testing.assert_array_equal(layout.unpack(rows[begin:end]), columns.T[begin:end])
    assert layout.pack(columns[:, :0]).shape == (0, layout.row_bytes)


def test_flat_rows_are_plain_int32_in_the_order_of_the_columns():
    columns = random_columns(FLAT, 50, 1)
    rows = FLAT.pack(columns)
    assert FLAT.row_bytes == 160 and [name for name, _ in FLAT.columns] == list(NAMES)
    assert rows.tobytes() == np.ascontiguousarray(columns.T).astype("<i4").tobytes()


@layouts
def test_wide_columns_come_first_without_gaps(seed):
    layout = random_layout(seed)
    widths = [int(kind[-1]) for _, kind in layout.columns]
    assert widths == sorted(widths, reverse=True) and sum(widths) == layout.row_bytes
    for width in (1, 2, 4):
        names = [name for name, kind in layout.columns if kind[-1] == str(width)]
        assert names == [name for name in NAMES if name in names], "in the order of the columns"
    begins = dict(zip([name for name, _ in layout.columns], np.cumsum([0, *widths]), strict=False))
    assert layout.offsets.tolist() == [begins[name] for name in NAMES]


@layouts
def test_groups_and_runs_are_the_row_and_its_columns(seed):
    """Groups cover a row in order; runs take the columns in order from the groups."""
    layout = random_layout(seed)
    columns = random_columns(layout, 30, seed)
    rows = layout.pack(columns)
    assert [begin for _, begin, _ in layout.width_groups] == [
        0,
        *(e for *_, e in layout.width_groups[:-1]),
    ]
    assert layout.width_groups[-1][2] == layout.row_bytes
    assert sorted((width for width, *_ in layout.width_groups), reverse=True) == [
        width for width in (4, 2, 1) if width in layout.widths
    ]
    types = {1: "u1", 2: "<u2", 4: "<i4"}
    parts = {
        width: np.ascontiguousarray(rows[:, begin:end]).view(types[width])
        for width, begin, end in layout.width_groups
    }
    assert all(
        one[0] != other[0]
        for one, other in zip(layout.stretches, layout.stretches[1:], strict=False)
    )
    found = np.concatenate(
        [parts[w][:, b:e].astype(np.int32) for w, b, e in layout.stretches], axis=1
    )
    np.testing.assert_array_equal(found, columns.T)


@pytest.mark.parametrize(
    "largest, width",
    [(0, 1), (1, 1), (255, 1), (256, 2), (65535, 2), (65536, 4), (2**31 - 1, 4)],
)
def test_a_column_gets_the_narrowest_type_that_holds_it(largest, width):
    for column in (0, 1, 13, 14, 39):
        most = [0] * 40
        most[column] = largest
        layout = Layout.holding(most)
        assert layout.widths == tuple(width if c == column else 1 for c in range(40))
        values = np.zeros((40, 1), np.int32)
        values[column] = largest
        assert layout.unpack(layout.pack(values))[0, column] == largest


@pytest.mark.parametrize("largest_integer, most_bytes", [(2**31 - 1, 113), (65535, 100)])
def test_a_row_of_criteos_tables_takes_few_bytes(largest_integer, most_bytes):
    counts = [int(word) for word in CRITEO_TABLES.split("-")]
    layout = Layout.holding([1, *[largest_integer] * 13, *(count - 1 for count in counts)])
    assert layout.row_bytes <= most_bytes


@layouts
def test_columns_tell_the_layout(seed):
    layout = random_layout(seed)
    assert Layout.from_columns(layout.columns) == layout
    assert Layout.from_columns(json.loads(json.dumps(layout.columns))) == layout


def changed(**changes):
    """Columns of a layout (label of 4 bytes, C26 of 2, others of 1) with some words changed."""
    columns = Layout((4, *[1] * 38, 2)).columns
    return [[changes.get(name, name), changes.get(f"type_{name}", kind)] for name, kind in columns]


@pytest.mark.parametrize(
    "columns",
    [
        [],
        changed()[:-1],
        changed()[1:],
        [*changed(), ["C27", "|u1"]],
        [*changed(), changed()[-1]],
        changed()[::-1],
        [changed()[1], changed()[0], *changed()[2:]],
        changed(I3="I99"),
        changed(I3="I4"),
        changed(type_label=">i4"),
        changed(type_label="<u4"),
        changed(type_label="<f4"),
        changed(type_label="<i8"),
        changed(type_C26="<i2"),
        changed(type_I1="|i1"),
        changed(type_I1="|b1"),
        changed(type_I1="nonsense"),
    ],
    ids=range(17),
)
def test_columns_of_no_layout_are_refused(columns):
    """As errors that meta.json is damaged is told from (prepared_data._DAMAGES)."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        Layout.from_columns(columns)


# ---------------------------------------------------------------- translation


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_repacked_with_ids_in_other_places_and_another_layout(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 300, 26)
    small = Layout.holding([1, *random.choice([255, 65535, 2**31 - 1], 13), *(sizes - 1)])
    columns = random_columns(small, 80, seed, negative=False)
    columns[14:] = random.integers(0, sizes[:, None], (26, 80))
    ids = [random.integers(0, 2**31, size).astype(np.int32) for size in sizes]
    ids[3] = np.arange(sizes[3], dtype=np.int32)
    places = random.permutation(80)
    to = Layout(
        tuple(max(width, int(random.choice([1, 2, 4]))) for width in small.widths[:14]) + (4,) * 26
    )
    repacked = small.repack(small.pack(columns), ids, to, places)
    want = columns.T.copy()
    for table in range(26):
        want[:, 14 + table] = ids[table][columns[14 + table]]
    np.testing.assert_array_equal(to.unpack(repacked)[places], want)
    assert repacked.shape == (80, to.row_bytes)


@layouts
def test_rows_are_repacked_as_they_are_without_ids(seed):
    layout = random_layout(seed)
    columns = random_columns(layout, 30, seed)
    rows = layout.pack(columns)
    np.testing.assert_array_equal(layout.repack(rows, None, layout, np.arange(30)), rows)
    flat = layout.repack(rows, None, FLAT, np.arange(30)[::-1])
    np.testing.assert_array_equal(FLAT.unpack(flat), columns.T[::-1])
    back = FLAT.repack(flat, None, layout, np.arange(30)[::-1])
    np.testing.assert_array_equal(back, rows)
    assert layout.repack(rows[:0], None, FLAT, np.arange(0)).shape == (0, 160)


def test_a_piece_without_rows_has_no_ids_and_is_repacked():
    empty = [np.zeros(0, np.int32)] * 26
    small = Layout((1,) * 40)
    assert small.repack(np.zeros((0, 40), np.uint8), empty, FLAT, np.arange(0)).shape == (0, 160)


# ---------------------------------------------------------------- reading


@layouts
def test_decoding_is_unpacking(seed):
    """On the CPU in one loop, on devices by operators: the same numbers."""
    layout = random_layout(seed)
    columns = random_columns(layout, 64, seed)
    rows = layout.pack(columns)
    dense, ids, label = layout.decode(rows)
    assert (dense.dtype, ids.dtype, label.dtype) == (np.float32, np.int64, np.float32)
    assert (dense.shape, ids.shape, label.shape) == ((64, 13), (64, 26), (64, 1))
    np.testing.assert_array_equal(dense, columns[1:14].T.astype(np.float32))
    np.testing.assert_array_equal(ids, columns[14:].T)
    np.testing.assert_array_equal(label, columns[:1].T.astype(np.float32))
    found = _unpacked(torch.from_numpy(rows), layout)
    assert found.dtype == torch.int32 and found.shape == (64, 40)
    np.testing.assert_array_equal(found.numpy(), columns.T)


@layouts
@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_rows_from_the_middle_of_a_batch_are_unpacked_by_operators(seed, size):
    """A view of one row is contiguous whatever its address: types of 4 bytes want multiples of 4.

    Pieces of a batch are such views.
    """
    layout = random_layout(seed)
    columns = random_columns(layout, 8, seed)
    rows = torch.from_numpy(layout.pack(columns))
    for begin in range(8 - size):
        found = _unpacked(rows[begin : begin + size], layout)
        np.testing.assert_array_equal(found.numpy(), columns.T[begin : begin + size])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("table", [0, 11, 25])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_the_first_id_outside_its_table_is_found(width, table, others):
    """An id equal to its table's rows is outside, one less is not; the first bad row is named."""
    widths = [others] * 40
    widths[14 + table] = width
    layout = Layout(tuple(widths))
    counts = [TOP[others] // 2 + 1] * 26
    counts[table] = TOP[width] // 3
    columns = random_columns(layout, 50, table, negative=False)
    columns[14:] %= np.array(counts)[:, None]
    columns[14 + table, 5] = counts[table] - 1
    assert layout.first_id_outside(layout.pack(columns), counts) is None
    columns[14 + table, 31] = counts[table]
    columns[14 + table, 40:] = TOP[width]
    assert layout.first_id_outside(layout.pack(columns), counts) == (31, table, counts[table])
    columns[14 + table, 0] = TOP[width]
    assert layout.first_id_outside(layout.pack(columns), counts) == (0, table, TOP[width])
    assert layout.first_id_outside(layout.pack(columns[:, :0]), counts) is None


def test_of_a_rows_bad_ids_the_first_table_is_named():
    layout = Layout((1,) * 14 + (1, 4, 2) * 8 + (1, 4))
    columns = np.zeros((40, 3), np.int32)
    columns[[16, 15, 39], 1] = 7
    assert layout.first_id_outside(layout.pack(columns), [7] * 26) == (1, 1, 7)


def test_an_id_below_zero_is_outside():
    columns = np.zeros((40, 3), np.int32)
    columns[20, 2] = -1
    assert FLAT.first_id_outside(FLAT.pack(columns), [2**31 - 1] * 26) == (2, 6, -1)


@pytest.mark.parametrize("width", [1, 2])
def test_a_table_of_more_rows_than_its_column_holds_has_all_ids_inside(width):
    layout = Layout((width,) * 40)
    columns = np.full((40, 2), TOP[width], np.int32)
    assert layout.first_id_outside(layout.pack(columns), [TOP[width] + 1] * 26) is None
    assert layout.first_id_outside(layout.pack(columns), [TOP[width]] * 26) == (0, 0, TOP[width])


@pytest.mark.parametrize("column", [0, 1, 13])
def test_labels_and_integers_are_no_ids(column):
    """Whatever they are, a damaged file's too, none of them is an id outside its table."""
    columns = np.zeros((40, 3), np.int32)
    for value in (2**31 - 1, -1, -(2**31)):
        columns[column, 1] = value
        assert FLAT.first_id_outside(FLAT.pack(columns), [1] * 26) is None
