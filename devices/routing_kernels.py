"""A compiled loop that sorts ids by the rank that has their rows."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.compiled import compiled

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class RoutedMatrices(NamedTuple):
    """C matrices that are looked up, and their P parts, matrix by matrix, as arrays.

    Attributes:
        table: (C,) number of the table whose ids are looked up.
        divisor: (C,) ids that share a row, one after the other.
        modulus: (C,) ids this far apart share a row; 0: no two do.
        group: (C,) number of the group, whose requests come together.
        slot: (C,) place of its vectors among those of the group.
        num_slots: (C,) number of places in the group.
        first_part: (C + 1,) where its parts begin.
        begin: (P,) first row of the part.
        rank: (P,) the rank that has it.
        shift: (P,) what leads from a row of the matrix to one of the rank's own; rows that are
            asked for have its type.
    """

    table: Ints
    divisor: Ints
    modulus: Ints
    group: Ints
    slot: Ints
    num_slots: Ints
    first_part: Ints
    begin: Ints
    rank: Ints
    shift: Rows


class Requests(NamedTuple):
    """Bags of rows, one for each bag of ids and part that has some of them, sorted by key.

    A key is rank * groups + group.

    Attributes:
        rows: (n,) rows of the ranks' own matrices, one bag after the other.
        lengths: (m,) rows of each bag.
        targets: (m,) where its vector belongs: row of the batch * places in the group + place.
        num_rows: (keys,) rows of all bags with that key.
        num_bags: (keys,) bags with that key.
    """

    rows: Rows
    lengths: Ints
    targets: Ints
    num_rows: Ints
    num_bags: Ints


@compiled
def _place(ids: Ints, k: int, c: int, matrices: RoutedMatrices) -> tuple[int, int]:
    """The row in matrix c of the id at position k, and the number of its part."""
    row = ids[k]
    if matrices.divisor[c] > 1:
        row //= matrices.divisor[c]
    if matrices.modulus[c]:
        row %= matrices.modulus[c]
    low, high = matrices.first_part[c], matrices.first_part[c + 1]
    while high - low > 1:
        middle = (low + high) // 2
        if matrices.begin[middle] <= row:
            low = middle
        else:
            high = middle
    return row, low


@compiled
def _count(
    ids: Ints, begins: Ints, lengths: Ints, matrices: RoutedMatrices, num_groups: int, num_keys: int
) -> tuple[Ints, Ints]:
    """(rows, bags) of each key."""
    num_rows, num_bags = np.zeros(num_keys, np.int64), np.zeros(num_keys, np.int64)
    seen = np.full(len(matrices.begin), -1)
    num_matrices = len(matrices.table)
    for bag in range(len(lengths) * num_matrices):
        i, c = divmod(bag, num_matrices)
        table = matrices.table[c]
        for k in range(begins[i, table], begins[i, table] + lengths[i, table]):
            part = _place(ids, k, c, matrices)[1]
            key = matrices.rank[part] * num_groups + matrices.group[c]
            num_rows[key] += 1
            num_bags[key] += seen[part] != bag
            seen[part] = bag
    return num_rows, num_bags


@compiled
def route(
    ids: Ints, begins: Ints, lengths: Ints, matrices: RoutedMatrices, num_groups: int, num_keys: int
) -> Requests:
    """Cut bags of ids into bags of rows that one rank has, sorted by rank and group.

    Args:
        ids: (n,) ids of b rows of the batch.
        begins: (b, T) position of each bag's first id.
        lengths: (b, T) number of its ids.
        matrices: who has which rows.
        num_groups: groups of matrices.
        num_keys: ranks * groups.
    """
    num_rows, num_bags = _count(ids, begins, lengths, matrices, num_groups, num_keys)
    next_row, next_bag = np.cumsum(num_rows) - num_rows, np.cumsum(num_bags) - num_bags
    rows = np.empty(num_rows.sum(), matrices.shift.dtype)
    new_lengths, targets = np.zeros(num_bags.sum(), np.int64), np.empty(num_bags.sum(), np.int64)
    num_parts, num_matrices = len(matrices.begin), len(matrices.table)
    counted, placed = np.full(num_parts, -1), np.full(num_parts, -1)  # the last bag that was
    bag_of_part, row_of_part = np.zeros(num_parts, np.int64), np.zeros(num_parts, np.int64)
    for number in range(len(lengths) * num_matrices):
        i, c = divmod(number, num_matrices)
        table = matrices.table[c]
        first, last = begins[i, table], begins[i, table] + lengths[i, table]
        for k in range(first, last):
            part = _place(ids, k, c, matrices)[1]
            if counted[part] != number:
                key = matrices.rank[part] * num_groups + matrices.group[c]
                counted[part], bag_of_part[part] = number, next_bag[key]
                targets[next_bag[key]] = i * matrices.num_slots[c] + matrices.slot[c]
                next_bag[key] += 1
            new_lengths[bag_of_part[part]] += 1
        for k in range(first, last):
            row, part = _place(ids, k, c, matrices)
            if placed[part] != number:
                key = matrices.rank[part] * num_groups + matrices.group[c]
                placed[part], row_of_part[part] = number, next_row[key]
                next_row[key] += new_lengths[bag_of_part[part]]
            rows[row_of_part[part]] = row + matrices.shift[part]
            row_of_part[part] += 1
    return Requests(rows, new_lengths, targets, num_rows, num_bags)
