"""Dense ids in order of first appearance, against dictionaries; what they take of memory."""

import tracemalloc

import numpy as np
import pytest

from preparation import category_ids
from preparation.category_ids import DIRECT_RANGE, SPLIT_FROM, IdMap, LocalIds, _hash

INVERSE = pow(2654435769, -1, 2**32)  # of the factor of _hash
SLACK = 4 << 20  # bytes that do not grow with the values: what one list needs


def keys_of(hashes):
    """The int32 values whose _hash is `hashes`."""
    keys = [int(one) * INVERSE % 2**32 for one in hashes]
    values = np.array(keys, np.uint32).view(np.int32)
    assert [_hash(int(value)) for value in values[:5]] == list(hashes[:5])
    return values


def first_appearances(values):
    """(places of each value among the distinct ones, these in order of first appearance)."""
    seen = {}
    places = [seen.setdefault(value, len(seen)) for value in values]
    return places, list(seen)


def assert_ids_as_by_hand(id_map, lists):
    """Give lists of distinct values to a map; ids and their number as a dictionary's."""
    seen = {}
    for values in lists:
        want = [seen.setdefault(value, len(seen)) for value in values.tolist()]
        found = id_map.ids(values)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, want)
        assert id_map.num_ids == len(seen)


def distinct_lists(seed, number, size, low, high):
    """Lists of distinct values in random order, a part of each known from the lists before."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(number):
        values = np.unique(random.integers(low, high, random.integers(0, size + 1)))
        if lists and random.random() < 0.7:
            old = lists[random.integers(len(lists))]
            values = np.union1d(values, old[: random.integers(0, len(old) + 1)])
        lists.append(random.permutation(values).astype(np.int32))
    return lists


# ---------------------------------------------------------------- places in a piece


@pytest.mark.parametrize("high", [1, 3, 100, 2**31])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 64, 1000])
def test_places_of_many_columns_in_blocks(num_rows, high):
    """Columns one after the other through one map do not see each other's values."""
    random = np.random.default_rng(num_rows)
    local = LocalIds(num_rows)
    for _ in range(26):
        values = random.integers(-high, high, random.integers(1, num_rows + 1)).astype(np.int32)
        cuts = np.sort(random.integers(0, len(values) + 1, 3))
        blocks = [block.copy() for block in np.split(values, cuts)]
        distinct = local.replace(blocks)
        places, seen = first_appearances(values.tolist())
        np.testing.assert_array_equal(np.concatenate(blocks), places)
        assert distinct.dtype == np.int32 and distinct.tolist() == seen


def test_places_of_rows_of_a_matrix_and_of_none():
    """Blocks are views of columns that lie among others."""
    local = LocalIds(4)
    matrix = np.array([[5, 5, 7, 5], [1, 2, 3, 2]], np.int32)
    assert local.replace([matrix[0]]).tolist() == [5, 7]
    assert matrix.tolist() == [[0, 0, 1, 0], [1, 2, 3, 2]]
    assert local.replace([matrix[1]]).tolist() == [1, 2, 3]
    assert local.replace([]).tolist() == [] == local.replace([matrix[0, :0]]).tolist()
    assert LocalIds(0).replace([]).tolist() == []


def test_the_distinct_values_of_a_column_stay_when_the_next_one_comes():
    local = LocalIds(2)
    first = local.replace([np.array([8, 9], np.int32)])
    local.replace([np.array([3, 4], np.int32)])
    assert first.tolist() == [8, 9]


def test_places_of_values_that_all_begin_at_one_slot():
    """As many rows as the map is made for, each value's probing begins at the last slot."""
    local = LocalIds(256)
    slots = len(local._keys)
    same_slot = [(high << 25 | (slots - 1) << 7 | low) for high in range(2) for low in range(128)]
    values = keys_of(same_slot)
    assert len({_hash(int(v)) >> 7 & (slots - 1) for v in values}) == 1
    random = np.random.default_rng(0)
    for _ in range(5):
        column = random.permutation(values)
        block = column.copy()
        assert local.replace([block]).tolist() == column.tolist()
        assert block.tolist() == list(range(256))


@pytest.mark.parametrize("below", [0, 1, 5, 63, 64, 65, 100])
def test_places_when_the_counter_of_all_columns_begins_anew(below):
    """Near 2^31 old places are forgotten; before it they are still older than the new ones."""
    local = LocalIds(64)
    local._base = 2**31 - 2 - 64 - below
    random = np.random.default_rng(below)
    bases = []
    for column in range(12):
        values = (random.integers(0, 64, 64) + column % 2 * 32).astype(np.int32)
        block = values.copy()
        distinct = local.replace([block])
        places, seen = first_appearances(values.tolist())
        assert block.tolist() == places and distinct.tolist() == seen
        bases.append(local._base)
    assert max(bases) < 2**31 and min(bases[1:]) < 1000, "it did begin anew"


# ---------------------------------------------------------------- ids of all


@pytest.mark.parametrize("size", [1, 20, 5000])
def test_ids_in_a_bounded_range(size):
    assert_ids_as_by_hand(IdMap(7000), [*distinct_lists(size, 30, size, 0, 7000)])
    ends = np.array([6999, 0], np.int32)
    assert_ids_as_by_hand(IdMap(7000), [ends, ends[::-1].copy()])
    assert_ids_as_by_hand(IdMap(1), [np.zeros(0, np.int32), np.zeros(1, np.int32)])


@pytest.mark.parametrize("split_from", [0, 10, 1000, 1 << 16])
@pytest.mark.parametrize("max_ind_range", [-1, DIRECT_RANGE + 1, 2**32])
def test_ids_of_any_values(max_ind_range, split_from, monkeypatch):
    """From the first value on to beyond the cut into partitions, which grow."""
    monkeypatch.setattr(category_ids, "SPLIT_FROM", split_from)
    id_map = IdMap(max_ind_range)
    assert id_map._table is None
    low, high = (-(2**31), 2**31) if max_ind_range != DIRECT_RANGE + 1 else (0, max_ind_range)
    ends = np.array([high - 1, low, 7, 1], np.int32)
    lists = [ends[:0], ends, *distinct_lists(split_from, 25, 2000, low, high), ends[::-1].copy()]
    assert_ids_as_by_hand(id_map, lists)
    assert (len(id_map._partitions) > 1) == (split_from < 1 << 16)


def test_ids_beyond_the_cut_as_it_is():
    """More than SPLIT_FROM values in lists of 30,000: one after the other, and spread widely."""
    values = np.arange(120_000, dtype=np.int64)
    for step in (1, 35_791, 64, 1 << 26):
        spread = np.unique(values * step % 2**32)
        spread = np.random.default_rng(step).permutation(spread).astype(np.uint32).view(np.int32)
        id_map = IdMap(-1)
        lists = [spread[at : at + 30_000] for at in range(0, len(spread), 20_000)]
        assert_ids_as_by_hand(id_map, lists)
        assert (len(id_map._partitions) > 1) == (len(spread) > SPLIT_FROM)


@pytest.mark.parametrize("split_from", [0, 1 << 16])
@pytest.mark.parametrize("low", [0, 1 << 25, (1 << 26) - 3000])
def test_ids_of_values_whose_hashes_are_neighbours(low, split_from, monkeypatch):
    """All 3000 in one partition, and about one slot: the last one, too, behind which is the first.

    Without partitions another 3 values a hash have the same low bits.
    """
    monkeypatch.setattr(category_ids, "SPLIT_FROM", split_from)
    hashes = [17 << 26 | low + number for number in range(3000)]
    hashes += [other << 26 | low + number for other in (0, 5, 63) for number in range(3000)]
    values = np.random.default_rng(low).permutation(keys_of(hashes))
    lists = [values[at : at + 700] for at in range(0, len(values), 500)]
    assert_ids_as_by_hand(IdMap(-1), lists)


def test_one_long_list_and_then_short_ones():
    """The first list alone is more than what a map is cut at."""
    random = np.random.default_rng(1)
    values = random.permutation(np.unique(random.integers(-(2**31), 2**31, 150_000)))
    values = values.astype(np.int32)
    lists = [values[:140_000], values[-20_000:], values[:10], values[100_000:]]
    id_map = IdMap(-1)
    assert_ids_as_by_hand(id_map, lists)
    assert id_map.num_ids == len(values)


def test_ids_do_not_depend_on_how_values_are_known():
    """A table of all values of a range and a map give the same ids."""
    lists = distinct_lists(9, 20, 5000, 0, 50_000)
    for values in lists:
        assert (values >= 0).all()
    table, spread = IdMap(50_000), IdMap(-1)
    for values in lists:
        np.testing.assert_array_equal(table.ids(values), spread.ids(values))
    assert table.num_ids == spread.num_ids


def test_two_steps_give_the_ids_of_one_pass():
    """Places in each piece's list, then ids of the lists: dictionaries over all rows."""
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


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_a_value_takes_at_most_16_bytes_at_any_time(traced):
    """3,000,000 values in lists of 50,000: the peak of each step beyond what the values take."""
    keys = np.arange(3_000_000, dtype=np.uint32) * np.uint32(2246822519)  # odd: all are distinct
    values = keys.view(np.int32)
    IdMap(-1).ids(values[:10])  # compiled
    before = tracemalloc.get_traced_memory()[0]
    id_map = IdMap(-1)
    for at in range(0, len(values), 50_000):
        tracemalloc.reset_peak()
        id_map.ids(values[at : at + 50_000])
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= 16 * id_map.num_ids + SLACK, f"at {id_map.num_ids} values"
    assert id_map.num_ids == len(values) and len(id_map._partitions) > 1
    np.testing.assert_array_equal(
        id_map.ids(values[1_000_000:1_000_100]), np.arange(10**6, 10**6 + 100)
    )


def test_a_bounded_range_takes_4_bytes_a_value_of_it(traced):
    """However many of them come."""
    values = np.arange(3_000_000, dtype=np.int32)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    id_map = IdMap(10_000_000)
    for at in range(0, len(values), 50_000):
        id_map.ids(values[at : at + 50_000])
    assert tracemalloc.get_traced_memory()[1] - before <= 4 * 10_000_000 + SLACK
    assert id_map.num_ids == len(values)
