"""Dense ids in order of first appearance, against dictionaries; the memory that they take."""

import tracemalloc

import numpy as np
import pytest

from preparation.category_ids import DIRECT_RANGE, IdMap, LocalIds

INVERSE = pow(2654435769, -1, 2**32)  # of the factor of the maps' hash
SLACK = 4 << 20  # bytes that do not grow with the values: one list's


def values_of(hashes):
    """The int32 values that have these hashes."""
    keys = [int(one) * INVERSE % 2**32 for one in hashes]
    return np.array(keys, np.uint32).view(np.int32)


def first_appearances(values):
    """(index of each value among the distinct ones, these in order of first appearance)."""
    seen = {}
    indices = [seen.setdefault(value, len(seen)) for value in values]
    return indices, list(seen)


def assert_ids_as_by_hand(id_map, lists):
    """Give lists of distinct values to a map; ids and their number are a dictionary's."""
    seen = {}
    for values in lists:
        want = [seen.setdefault(value, len(seen)) for value in values.tolist()]
        found = id_map.ids(values)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, want)
        assert id_map.num_ids == len(seen)


def distinct_lists(seed, count, size, low, high):
    """Lists of distinct values in random order, a part of each known from the lists before."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        values = np.unique(random.integers(low, high, random.integers(0, size + 1)))
        if lists and random.random() < 0.7:
            old = lists[random.integers(len(lists))]
            values = np.union1d(values, old[: random.integers(0, len(old) + 1)])
        lists.append(random.permutation(values).astype(np.int32))
    return lists


# ---------------------------------------------------------------- indices in a piece


@pytest.mark.parametrize("last_index", [2**31 - 2, 2000])
@pytest.mark.parametrize("high", [1, 3, 100, 2**31])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 64, 1000])
def test_indices_of_many_columns_in_blocks(num_rows, high, last_index):
    """Columns one after another do not see each other's values, also when entries start anew."""
    random = np.random.default_rng(num_rows)
    local, kept = LocalIds(num_rows, last_index), []
    for _ in range(26):
        values = random.integers(-high, high, random.integers(0, num_rows + 1)).astype(np.int32)
        cuts = np.sort(random.integers(0, len(values) + 1, 3))
        blocks = [block.copy() for block in np.split(values, cuts)]
        distinct = local.replace(blocks)
        indices, seen = first_appearances(values.tolist())
        np.testing.assert_array_equal(np.concatenate(blocks), indices)
        assert distinct.dtype == np.int32
        kept.append((distinct, seen))
    assert all(distinct.tolist() == seen for distinct, seen in kept)


def test_indices_of_rows_of_a_matrix_and_of_none():
    """Blocks are views of columns that are among others."""
    local = LocalIds(4)
    matrix = np.array([[5, 5, 7, 5], [1, 2, 3, 2]], np.int32)
    assert local.replace([matrix[0]]).tolist() == [5, 7]
    assert matrix.tolist() == [[0, 0, 1, 0], [1, 2, 3, 2]]
    assert local.replace([]).tolist() == [] == local.replace([matrix[0, :0]]).tolist()
    assert LocalIds(0).replace([]).tolist() == []


def test_indices_of_values_that_all_begin_at_one_slot():
    """As many rows as the map is made for; each value's probing begins at the last slot."""
    slots = 512  # of 256 rows
    values = values_of(
        high << 25 | (slots - 1) << 7 | low for high in range(2) for low in range(128)
    )
    local, random = LocalIds(256), np.random.default_rng(0)
    for _ in range(5):
        column = random.permutation(values)
        block = column.copy()
        assert local.replace([block]).tolist() == column.tolist()
        assert block.tolist() == list(range(256))


# ---------------------------------------------------------------- ids of all


@pytest.mark.parametrize("size", [1, 20, 5000])
def test_ids_in_a_bounded_range(size):
    ends = np.array([6999, 0], np.int32)
    lists = [*distinct_lists(size, 30, size, 0, 7000), ends, ends[::-1].copy()]
    assert_ids_as_by_hand(IdMap(7000), lists)
    assert_ids_as_by_hand(IdMap(1), [np.zeros(0, np.int32), np.zeros(1, np.int32)])


@pytest.mark.parametrize("split_from", [0, 10, 1000, 1 << 16])
@pytest.mark.parametrize("max_ind_range", [-1, DIRECT_RANGE + 1, 2**32])
def test_ids_of_any_values(max_ind_range, split_from):
    """From the first value on to beyond the cut into partitions, which grow."""
    low, high = (-(2**31), 2**31) if max_ind_range != DIRECT_RANGE + 1 else (0, max_ind_range)
    ends = np.array([high - 1, low, 7, 1], np.int32)
    lists = [ends[:0], ends, *distinct_lists(split_from, 25, 2000, low, high), ends[::-1].copy()]
    assert_ids_as_by_hand(IdMap(max_ind_range, split_from), lists)


@pytest.mark.parametrize("split_from", [0, 1 << 16])
@pytest.mark.parametrize("low", [0, (1 << 26) - 1000])
def test_ids_of_values_whose_hashes_are_neighbours(low, split_from):
    """All in one partition and about one slot, also the last one, behind which is the first.

    Without partitions, another 3 values a hash have the same low bits.
    """
    hashes = [part << 26 | low + k for part in (17, 0, 5, 63) for k in range(1000)]
    values = np.random.default_rng(low).permutation(values_of(hashes))
    lists = [values[at : at + 700] for at in range(0, len(values), 500)]
    assert_ids_as_by_hand(IdMap(-1, split_from), lists)


def test_two_steps_give_the_ids_of_one_pass():
    """Indices in each piece's list, then ids of the lists: a dictionary's over all rows."""
    random = np.random.default_rng(2)
    pieces = [random.zipf(1.3, random.integers(0, 500)) % 1000 - 500 for _ in range(40)]
    local, id_map, found = LocalIds(500), IdMap(-1), []
    for piece in pieces:
        block = piece.astype(np.int32)
        ids = id_map.ids(local.replace([block]))
        found += ids[block].tolist()
    want, seen = first_appearances(np.concatenate(pieces).tolist())
    assert found == want and id_map.num_ids == len(seen)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "max_ind_range, value_bytes, fixed", [(-1, 16, 0), (10_000_000, 0, 40_000_000)]
)
def test_the_memory_of_a_map_is_bounded_at_any_time(max_ind_range, value_bytes, fixed):
    """1,500,000 values in lists of 50,000, beyond the cut into partitions and as they grow."""
    keys = np.arange(1_500_000, dtype=np.uint32)
    if max_ind_range < 0:
        keys *= np.uint32(2246822519)  # odd, so all are distinct
    values = keys.view(np.int32)
    IdMap(max_ind_range).ids(values[:10])  # compiled
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    id_map = IdMap(max_ind_range)
    for at in range(0, len(values), 50_000):
        tracemalloc.reset_peak()
        id_map.ids(values[at : at + 50_000])
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= fixed + value_bytes * id_map.num_ids + SLACK, f"at {id_map.num_ids} values"
    tracemalloc.stop()
    assert id_map.num_ids == len(values)
    np.testing.assert_array_equal(id_map.ids(values[10**6 :][:100]), np.arange(10**6, 10**6 + 100))
