"""Dense ids of categories, 0, 1, 2, ... in order of first appearance over all rows.

Pieces of text are parsed side by side, so ids come in two steps. First `LocalIds` replaces the
values of a column in a piece by indices into the piece's own list of distinct values, which are in
order of first appearance. Then `IdMap` takes these lists, piece after piece, and returns the id of
each value: the same id that one pass over all rows would give, for a small part of the work.

No data frame engine numbers values in order of first appearance with a state that lasts from piece
to piece (pandas.factorize forgets, np.unique sorts, polars joins 980,000 rows/s), so the loops are
written here.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled

DIRECT_RANGE = 1 << 27  # up to this bound, an array has an entry for every possible value
FIRST_SLOTS = 1 << 10
SPLIT_FROM = 1 << 16  # a map of more values than this is cut into partitions
PARTITION_BITS = 6
FILL = 0.8  # share of a partition's slots that are in use, at most
GROWTH = 1.4  # just after growing, 0.8 / 1.4 of the slots are in use: 8 bytes / 0.57 = 14 a value

Ints = npt.NDArray[np.int32]


@compiled
def _hash(key: int) -> int:
    """32 well-mixed bits (Knuth's multiplicative hash)."""
    return ((key & 0xFFFFFFFF) * 2654435769) & 0xFFFFFFFF


@compiled
def _replace_by_indices(
    column: Ints, keys: Ints, indices: Ints, base: int, distinct: Ints, num_distinct: int
) -> int:
    """Replace values by their indices in `distinct`, which grows; returns its new length.

    `keys` and `indices` are an open-addressing map from a value to its index + base + 1. An entry
    of at most `base` is left from an older column, so its slot is free.
    """
    mask = len(keys) - 1
    for i in range(len(column)):
        key = column[i]
        slot = (_hash(key) >> 7) & mask
        while indices[slot] > base and keys[slot] != key:
            slot = (slot + 1) & mask
        if indices[slot] <= base:
            distinct[num_distinct] = key
            num_distinct += 1
            keys[slot] = key
            indices[slot] = base + num_distinct
        column[i] = indices[slot] - base - 1
    return num_distinct


class LocalIds:
    """Replaces the values of one column after another by indices into its distinct values.

    Args:
        num_rows: rows of the longest column.
        last_index: the map's entries count on from column to column; before they pass this
            number, they start again at 0.
    """

    def __init__(self, num_rows: int, last_index: int = 2**31 - 2) -> None:
        slots = 1 << max(2 * num_rows - 1, 1).bit_length()
        self._last_base = last_index - num_rows
        self._keys, self._indices = np.empty(slots, np.int32), np.zeros(slots, np.int32)
        self._distinct = np.empty(num_rows, np.int32)
        self._base = 0

    def replace(self, blocks: list[Ints]) -> Ints:
        """Replace the values of a column, given as blocks, in place.

        Returns:
            (n,) the column's distinct values in order of first appearance.
        """
        num_distinct = 0
        if self._base > self._last_base:  # the entries are int32
            self._indices[:], self._base = 0, 0
        for block in blocks:
            num_distinct = _replace_by_indices(
                block, self._keys, self._indices, self._base, self._distinct, num_distinct
            )
        self._base += num_distinct
        return self._distinct[:num_distinct].copy()


@compiled
def _look_up(values: Ints, id_of: Ints, num_ids: int, ids: Ints) -> int:
    """Fill `ids` with the ids of distinct values; returns the new number of ids.

    id_of[value] is the value's id + 1, or 0 if it is new.
    """
    for i in range(len(values)):
        value = values[i]
        if id_of[value] == 0:
            num_ids += 1
            id_of[value] = num_ids
        ids[i] = id_of[value] - 1
    return num_ids


@compiled
def _slot_of(key: int, keys: Ints, ids: Ints) -> int:
    """The slot of `key`, or a free one for it: linear probing from its hash, scaled to the size."""
    size = len(keys)
    low = (_hash(key) << PARTITION_BITS) & 0xFFFFFFFF  # the high bits choose the partition
    slot = (low * size) >> 32
    while ids[slot] != 0 and keys[slot] != key:
        slot = slot + 1 if slot + 1 < size else 0
    return slot


@compiled
def _find(values: Ints, chosen: Any, keys: Ints, ids: Ints, found: Ints) -> int:
    """Fill `found` with the chosen values' ids, -1 for new ones; returns the number of new ones."""
    new = 0
    for i in chosen:
        found[i] = ids[_slot_of(values[i], keys, ids)] - 1
        new += found[i] < 0
    return new


@compiled
def _insert(values: Ints, chosen: Any, first_id: int, new_ids: Ints, keys: Ints, ids: Ints) -> None:
    """Insert those of the chosen values that are new: their ids are at least `first_id`."""
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
    """Fill `order` with the values' indices, sorted by partition; ends[p] becomes p's end."""
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
    """An open-addressing map from some of the values to their ids: 8 bytes a slot."""

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
    """The ids of one column's values, in order of first appearance over all lists given to it.

    If the values have a bound of at most DIRECT_RANGE, an int32 array has an entry for every
    possible value; the system allocates its pages on first use. Otherwise values are any int32, and
    their hash spreads them over partitions. Partitions grow one at a time, so the map is never in
    memory twice: it takes at most 16 bytes a value. The given lists come on top of that.

    Args:
        max_ind_range: if it is > 0, the values are in [0, max_ind_range).
        split_from: number of values beyond which the map is cut into partitions.

    Attributes:
        num_ids: ids given so far.
    """

    def __init__(self, max_ind_range: int, split_from: int = SPLIT_FROM) -> None:
        self.num_ids, self._split_from = 0, split_from
        self._id_of = None
        if 0 < max_ind_range <= DIRECT_RANGE:
            self._id_of = np.zeros(max_ind_range, np.int32)
        self._partitions = [_Partition()]

    def ids(self, values: Ints) -> Ints:
        """Ids (n,) int32 of distinct values (n,); new values get the next ids, in order."""
        ids = np.empty(len(values), np.int32)
        if self._id_of is not None:
            self.num_ids = _look_up(values, self._id_of, self.num_ids, ids)
            return ids
        if len(self._partitions) == 1 and self.num_ids > self._split_from:
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
        """Each partition with the indices of its values."""
        if len(self._partitions) == 1:
            return [(self._partitions[0], np.arange(len(values)))]
        ends = np.zeros(len(self._partitions), np.int64)
        order = np.empty(len(values), np.int64)
        _by_partition(values, 32 - PARTITION_BITS, ends, order)
        return list(zip(self._partitions, np.split(order, ends[:-1]), strict=True))

    def _split(self) -> None:
        """Spread the values of the only partition over many."""
        (whole,) = self._partitions
        used = np.flatnonzero(whole.ids)
        values, ids = whole.keys[used], whole.ids[used] - 1
        self._partitions = [_Partition() for _ in range(1 << PARTITION_BITS)]
        for partition, chosen in self._groups(values):
            partition.make_room(len(chosen))
            _insert(values, chosen, 0, ids, partition.keys, partition.ids)
