"""Packed rows: what is packed is what is read, whoever reads it."""

import json

import numpy as np
import pytest
import torch

from criteo.columns import NAMES
from criteo.row_layout import FLAT, Layout
from model.batch import _unpack

LARGEST = {1: 2**8 - 1, 2: 2**16 - 1, 4: 2**31 - 1}
CRITEO_TABLES = (
    "10000000-32448-15529-7289-19879-3-6611-1384-62-10000000-1262224-284369-10-2208-10424-89-4-963"
    "-14-10000000-6919756-10000000-397757-11440-103-35"
)


def random_layout(seed):
    """Columns of random widths; for the first three seeds, all of one width."""
    widths = (1, 2, 4) if seed >= 3 else ((1, 2, 4)[seed],)
    return Layout(tuple(np.random.default_rng(seed).choice(widths, 40).tolist()))


def random_columns(layout, num_rows, seed, negative=True):
    """(40, n) int32 that the layout holds: both ends of what each column can be, and between."""
    random = np.random.default_rng(seed)
    columns = np.empty((40, num_rows), np.int32)
    for column, width in enumerate(layout.widths):
        low, high = -(2**31) if width == 4 and negative else 0, LARGEST[width]
        values = random.integers(low, high + 1, num_rows)
        ends = random.choice([low, low + 1, 0, 1, 127, 128, high - 1, high], num_rows)
        columns[column] = np.where(random.random(num_rows) < 0.5, values, ends)
    return columns


layouts = pytest.mark.parametrize("seed", range(8))


@layouts
def test_packed_rows_are_read_by_the_module_and_by_numpys_structured_types(seed, tmp_path):
    """Rows at any address of a mapped file, read-only, and none at all."""
    layout = random_layout(seed)
    columns = random_columns(layout, 20, seed)
    packed = layout.pack(columns)
    assert packed.shape == (20, layout.row_bytes) and packed.dtype == np.uint8
    (tmp_path / "rows").write_bytes(packed.tobytes())
    rows = np.memmap(tmp_path / "rows", np.uint8, mode="r").reshape(-1, layout.row_bytes)
    for begin, end in ((0, 20), (1, 2), (7, 20), (3, 3)):
        np.testing.assert_array_equal(layout.unpack(rows[begin:end]), columns.T[begin:end])
    records = np.memmap(tmp_path / "rows", [tuple(column) for column in layout.columns], mode="r")
    for name, column in zip(NAMES, columns, strict=True):
        np.testing.assert_array_equal(records[name].astype(np.int32), column)
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
    assert Layout.from_columns(json.loads(json.dumps(layout.columns))) == layout


@layouts
def test_width_groups_cover_a_row_and_stretches_take_the_columns_from_them(seed):
    layout = random_layout(seed)
    columns = random_columns(layout, 30, seed)
    rows, groups, stretches = layout.pack(columns), layout.width_groups, layout.stretches
    assert [width for width, *_ in groups] == [w for w in (4, 2, 1) if w in layout.widths]
    assert [begin for _, begin, _ in groups] == [0, *(end for *_, end in groups[:-1])]
    assert groups[-1][2] == layout.row_bytes
    types = {1: "u1", 2: "<u2", 4: "<i4"}
    parts = {w: np.ascontiguousarray(rows[:, b:e]).view(types[w]) for w, b, e in groups}
    assert all(one[0] != other[0] for one, other in zip(stretches, stretches[1:], strict=False))
    found = np.concatenate([parts[w][:, b:e].astype(np.int32) for w, b, e in stretches], axis=1)
    np.testing.assert_array_equal(found, columns.T)


@pytest.mark.parametrize(
    "largest, width",
    [(0, 1), (255, 1), (256, 2), (65535, 2), (65536, 4), (2**31 - 1, 4)],
)
def test_a_column_gets_the_narrowest_type_that_holds_it(largest, width):
    for column in (0, 13, 14, 39):
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


def changed(**changes):
    """Columns of a layout (label of 4 bytes, C26 of 2, others of 1) with some words changed."""
    columns = Layout((4, *[1] * 38, 2)).columns
    return [[changes.get(name, name), changes.get(f"type_{name}", kind)] for name, kind in columns]


@pytest.mark.parametrize(
    "columns",
    [
        [],
        changed()[1:],
        [*changed(), ["C27", "|u1"]],
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
    ids=range(15),
)
def test_columns_of_no_layout_are_refused(columns):
    """criteo/meta_file.py looks at the columns of a meta.json before."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        Layout.from_columns(columns)


# ---------------------------------------------------------------- other layouts, ids for categories


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_repacked_with_ids_at_other_positions_and_in_another_layout(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 300, 26)
    small = Layout.holding([1, *random.choice([255, 65535, 2**31 - 1], 13), *(sizes - 1)])
    columns = random_columns(small, 80, seed, negative=False)
    columns[14:] = random.integers(0, sizes[:, None], (26, 80))
    ids = [random.integers(0, 2**31, size).astype(np.int32) for size in sizes]
    positions = random.permutation(80)
    wider = tuple(max(width, int(random.choice([1, 2, 4]))) for width in small.widths[:14])
    to = Layout(wider + (4,) * 26)
    repacked = small.repack(small.pack(columns), ids, to, positions)
    want = columns.T.copy()
    for table in range(26):
        want[:, 14 + table] = ids[table][columns[14 + table]]
    np.testing.assert_array_equal(to.unpack(repacked)[positions], want)
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
    for ids in (None, [np.zeros(0, np.int32)] * 26):  # a piece without rows has no ids
        assert layout.repack(rows[:0], ids, FLAT, np.arange(0)).shape == (0, 160)


# ---------------------------------------------------------------- rows for a model


@layouts
def test_decoding_is_unpacking(seed):
    """On the CPU in one loop, on devices by operators: the same numbers.

    Pieces of a batch are views at any address, and types of 4 bytes want multiples of 4.
    """
    layout = random_layout(seed)
    columns = random_columns(layout, 64, seed)
    rows = layout.pack(columns)
    dense, ids, label = layout.decode(rows)
    assert (dense.dtype, ids.dtype, label.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_array_equal(dense, columns[1:14].T.astype(np.float32))
    np.testing.assert_array_equal(ids, columns[14:].T)
    np.testing.assert_array_equal(label, columns[:1].T.astype(np.float32))
    for begin, end in ((0, 64), *((k, k + size) for k in range(5) for size in (0, 1, 2))):
        found = _unpack(torch.from_numpy(rows)[begin:end], layout)
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), columns.T[begin:end])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("table", [0, 11, 25])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_the_first_row_with_an_id_outside_its_table_is_found(width, table, others):
    """An id equal to its table's rows is outside, one less is not; the first bad row is named."""
    widths = [others] * 40
    widths[14 + table] = width
    layout = Layout(tuple(widths))
    counts = [LARGEST[others] // 2 + 1] * 26
    counts[table] = LARGEST[width] // 3
    columns = random_columns(layout, 50, table, negative=False)
    columns[14:] %= np.array(counts)[:, None]
    columns[0] %= 2
    columns[14 + table, 5] = counts[table] - 1
    outside = f"of table {table} is outside its {counts[table]} rows"
    assert layout.first_fault(layout.pack(columns), counts) is None
    columns[14 + table, 31] = counts[table]
    columns[14 + table, 40:] = LARGEST[width]
    found = layout.first_fault(layout.pack(columns), counts)
    assert found == (31, f"id {counts[table]} {outside}")
    columns[14 + table, 0] = LARGEST[width]
    assert layout.first_fault(layout.pack(columns), counts) == (0, f"id {LARGEST[width]} {outside}")
    assert layout.first_fault(layout.pack(columns[:, :0]), counts) is None


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_the_first_row_with_another_label_than_0_and_1_is_found(width, others):
    layout = Layout((width, *[others] * 39))
    columns = np.zeros((40, 9), np.int32)
    columns[0, ::2] = 1
    assert layout.first_fault(layout.pack(columns), [1] * 26) is None
    columns[0, 7], columns[14, 6:] = 2, 1  # the label comes first in a row, the id is a row before
    fault = "id 1 of table 0 is outside its 1 rows"
    assert layout.first_fault(layout.pack(columns), [1] * 26) == (6, fault)
    for label in (2, LARGEST[width], *([-1] if width == 4 else [])):
        columns[0, 6] = label
        fault = f"label {label} is neither 0 nor 1"
        assert layout.first_fault(layout.pack(columns), [1] * 26) == (6, fault)


def test_the_first_table_of_a_rows_bad_ids_is_named():
    layout = Layout((1,) * 14 + (1, 4, 2) * 8 + (1, 4))
    columns = np.zeros((40, 3), np.int32)
    columns[[16, 15, 39], 1] = 7
    fault = "id 7 of table 1 is outside its 7 rows"
    assert layout.first_fault(layout.pack(columns), [7] * 26) == (1, fault)


def test_an_id_below_zero_is_outside_and_integers_are_no_ids():
    columns = np.zeros((40, 3), np.int32)
    for value in (2**31 - 1, -1, -(2**31)):
        columns[[1, 13], 1] = value
        assert FLAT.first_fault(FLAT.pack(columns), [1] * 26) is None
    columns[20, 2] = -1
    fault = f"id -1 of table 6 is outside its {2**31 - 1} rows"
    assert FLAT.first_fault(FLAT.pack(columns), [2**31 - 1] * 26) == (2, fault)


@pytest.mark.parametrize("width", [1, 2])
def test_a_table_of_more_rows_than_its_column_holds_has_all_ids_inside(width):
    layout, largest = Layout((width,) * 40), LARGEST[width]
    columns = np.full((40, 2), largest, np.int32)
    columns[0] = 1
    rows = layout.pack(columns)
    assert layout.first_fault(rows, [largest + 1] * 26) is None
    fault = f"id {largest} of table 0 is outside its {largest} rows"
    assert layout.first_fault(rows, [largest] * 26) == (0, fault)
