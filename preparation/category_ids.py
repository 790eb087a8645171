"""Dense ids of categories, 0, 1, 2, ... in order of first appearance over all rows.

Rows are parsed in pieces side by side, so ids come in two steps. A piece replaces the values of a
column by places in its own list of distinct values, in order of first appearance (`LocalIds`).
Then the lists, piece after piece, give each value its id (`IdMap`): the same ids as one pass over
all rows would give, for a small part of the work.

No data frame engine gives ids in order of first appearance with a state between pieces
(pandas.factorize forgets, np.unique sorts, polars joins at 980,000 rows/s), so the loops are ours.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled

DIRECT_RANGE = 1 << 27  # values up to which ids are looked up in a table of all of them
FIRST_SLOTS = 1 << 10
SPLIT_FROM = 1 << 16  # values in a map from which on it is cut into partitions
PARTITION_BITS = 6
FILL = 0.8  # of a partition's slots, at most
GROWTH = (
    1.4  # FILL / GROWTH of the slots are in use just after growing: 8 bytes / 0.57 = 14 a value
)

Ints = npt.NDArray[np.int32]


@compiled
def _hash(key: int) -> int:
    """32 well-mixed bits (Knuth's multiplicative hash)."""
    return ((key & 0xFFFFFFFF) * 2654435769) & 0xFFFFFFFF


@compiled
def _replace_by_places(
    column: Ints, keys: Ints, places: Ints, base: int, distinct: Ints, num_distinct: int
) -> int:
    """Replace values by their places in `distinct`, which grows; gives how many it holds.

    `keys` and `places` are an open-addressing map; a place (counted from `base` + 1) of at most
    `base` is an older column's, so the slot is free.
    """
    mask = len(keys) - 1
    for i in range(len(column)):
        key = column[i]
        slot = (_hash(key) >> 7) & mask
        while places[slot] > base and keys[slot] != key:
            slot = (slot + 1) & mask
        if places[slot] <= base:
            distinct[num_distinct] = key
            num_distinct += 1
            keys[slot] = key
            places[slot] = base + num_distinct
        column[i] = places[slot] - base - 1
    return num_distinct


class LocalIds:
    """Replaces values of one column after the other by places in their lists of distinct values.

    Args:
        num_rows: of a column, at most.
    """

    def __init__(self, num_rows: int) -> None:
        slots = 1 << max(2 * num_rows - 1, 1).bit_length()
        self._keys, self._places = np.empty(slots, np.int32), np.zeros(slots, np.int32)
        self._distinct = np.empty(num_rows, np.int32)
        self._base = 0

    def replace(self, blocks: list[Ints]) -> Ints:
        """Replace the values of a column that lies in blocks, in place; gives its distinct ones."""
        number = 0
        if self._base > 2**31 - 2 - len(self._distinct):
            self._places[:], self._base = 0, 0
        for block in blocks:
            number = _replace_by_places(
                block, self._keys, self._places, self._base, self._distinct, number
            )
        self._base += number
        return self._distinct[:number].copy()


@compiled
def _ids_by_table(values: Ints, id_of: Ints, num_ids: int, ids: Ints) -> int:
    """Ids of distinct values; id_of[value] is the id + 1, 0 where the value was not seen yet."""
    for i in range(len(values)):
        value = values[i]
        if id_of[value] == 0:
            num_ids += 1
            id_of[value] = num_ids
        ids[i] = id_of[value] - 1
    return num_ids


@compiled
def _slot_of(key: int, keys: Ints, ids: Ints) -> int:
    """Where `key` is, or would go: linear probing from its hash's low bits, scaled to the size."""
    size = len(keys)
    low = (_hash(key) << PARTITION_BITS) & 0xFFFFFFFF  # its high bits choose the partition
    slot = (low * size) >> 32
    while ids[slot] != 0 and keys[slot] != key:
        slot = slot + 1 if slot + 1 < size else 0
    return slot


@compiled
def _find(values: Ints, chosen: Any, keys: Ints, ids: Ints, found: Ints) -> int:
    """Fill `found` with the chosen values' ids, -1 for new ones; gives the number of new ones."""
    new = 0
    for i in chosen:
        found[i] = ids[_slot_of(values[i], keys, ids)] - 1
        new += found[i] < 0
    return new


@compiled
def _insert(values: Ints, chosen: Any, first_id: int, new_ids: Ints, keys: Ints, ids: Ints) -> None:
    """Enter the chosen values that are new: those whose id is at least `first_id`."""
    for i in chosen:
        if new_ids[i] >= first_id:
            slot = _slot_of(values[i], keys, ids)
            keys[slot] = values[i]
            ids[slot] = new_ids[i] + 1


@compiled
def _move(keys: Ints, ids: Ints, new_keys: Ints, new_ids: Ints) -> None:
    for i in range(len(keys)):
        if ids[i] != 0:
            slot = _slot_of(keys[i], new_keys, new_ids)
            new_keys[slot] = keys[i]
            new_ids[slot] = ids[i]


@compiled
def _by_partition(values: Ints, shift: int, ends: Any, order: Any) -> None:
    """Places of the values, partition by partition; ends[p] is where partition p's end."""
    for i in range(len(values)):
        ends[_hash(values[i]) >> shift] += 1
    for p in range(1, len(ends)):
        ends[p] += ends[p - 1]
    for i in range(len(values) - 1, -1, -1):
        p = _hash(values[i]) >> shift
        ends[p] -= 1
        order[ends[p]] = i
    for p in range(1, len(ends)):
        ends[p - 1] = ends[p]
    ends[-1] = len(values)


class _Partition:
    """An open-addressing map of some of the values: 8 bytes a slot."""

    def __init__(self) -> None:
        self.num_values = 0
        self.keys, self.ids = np.empty(FIRST_SLOTS, np.int32), np.zeros(FIRST_SLOTS, np.int32)

    def make_room(self, number: int) -> None:
        """Grow until `number` more values fit."""
        needed = self.num_values + number
        slots = len(self.keys)
        while needed > FILL * slots:
            slots = int(slots * GROWTH)
        if slots > len(self.keys):
            keys, ids = np.empty(slots, np.int32), np.zeros(slots, np.int32)
            _move(self.keys, self.ids, keys, ids)
            self.keys, self.ids = keys, ids
        self.num_values = needed


class IdMap:
    """Ids of a column's values in order of first appearance over all lists given to it.

    Args:
        max_ind_range: > 0: values lie in [0, max_ind_range), and up to DIRECT_RANGE ids lie in a
            table of int32 that the system hands out page by page. Else values are any int32, in
            partitions by hash that grow one at a time, so that a growing map never exists twice:
            at most 16 bytes a value, beside what lists take that are much shorter than the map.
    """

    def __init__(self, max_ind_range: int) -> None:
        self.num_ids = 0
        self._table = None
        if 0 < max_ind_range <= DIRECT_RANGE:
            self._table = np.zeros(max_ind_range, np.int32)
        self._partitions = [_Partition()]

    def ids(self, values: Ints) -> Ints:
        """Ids (n,) of distinct values (n,)."""
        ids = np.empty(len(values), np.int32)
        if self._table is not None:
            self.num_ids = _ids_by_table(values, self._table, self.num_ids, ids)
            return ids
        if len(self._partitions) == 1 and self.num_ids > SPLIT_FROM:
            self._split()
        groups = self._groups(values)
        new = [
            _find(values, chosen, partition.keys, partition.ids, ids)
            for partition, chosen in groups
        ]
        is_new = ids < 0
        first_id, self.num_ids = self.num_ids, self.num_ids + int(is_new.sum())
        ids[is_new] = np.arange(first_id, self.num_ids, dtype=np.int32)
        for (partition, chosen), number in zip(groups, new, strict=True):
            partition.make_room(number)
            _insert(values, chosen, first_id, ids, partition.keys, partition.ids)
        return ids

    def _groups(self, values: Ints) -> list[tuple[_Partition, Any]]:
        """Each partition with the places of its values."""
        if len(self._partitions) == 1:
            return [(self._partitions[0], np.arange(len(values)))]
        ends = np.zeros(len(self._partitions), np.int64)
        order = np.empty(len(values), np.int64)
        _by_partition(values, 32 - PARTITION_BITS, ends, order)
        return list(zip(self._partitions, np.split(order, ends[:-1]), strict=True))

    def _split(self) -> None:
        """Spread the one partition's values over many."""
        (whole,) = self._partitions
        used = np.flatnonzero(whole.ids)
        values, ids = whole.keys[used], whole.ids[used] - 1
        self._partitions = [_Partition() for _ in range(1 << PARTITION_BITS)]
        for partition, chosen in self._groups(values):
            partition.make_room(len(chosen))
            _insert(values, chosen, 0, ids, partition.keys, partition.ids)
