"""The loop that sorts ids by the rank that has their rows equals loops over lists."""

import numpy as np
import pytest

from devices.routing_kernels import RoutedMatrices, route


def draw_matrices(random, num_tables, num_ranks, num_groups):
    """Matrices as records, with their parts as (begin, rank, shift), and ids that each table has.

    Several matrices look up the ids of one table, and not all tables have one.
    """
    ids_of = random.integers(1, 30, num_tables)
    slots, matrices = [0] * num_groups, []
    for _ in range(random.integers(1, 2 * num_tables + 1)):
        table, group = random.integers(num_tables), random.integers(num_groups)
        divisor = random.choice([1, 1, 2, 5])
        rows = (ids_of[table] - 1) // divisor + 1
        modulus = random.integers(1, rows + 1) if random.random() < 0.3 else 0
        rows = modulus or rows
        cuts = sorted({0, *random.integers(0, rows, random.integers(0, 4)).tolist()})
        parts = [
            (begin, random.integers(num_ranks), random.integers(-begin, 100)) for begin in cuts
        ]
        matrices.append(
            dict(table=table, divisor=divisor, modulus=modulus, group=group, slot=slots[group],
                 parts=parts)
        )  # fmt: skip
        slots[group] += 1
    for matrix in matrices:
        matrix["num_slots"] = slots[matrix["group"]]
    return matrices, ids_of


def as_arrays(matrices, type_of_rows=np.int32):
    columns = {
        name: [matrix[name] for matrix in matrices]
        for name in ("table", "divisor", "modulus", "group", "slot", "num_slots")
    }
    counts = [len(matrix["parts"]) for matrix in matrices]
    parts = np.array([part for matrix in matrices for part in matrix["parts"]]).T
    columns |= {"first_part": np.cumsum([0, *counts])}
    columns |= zip(("begin", "rank", "shift"), parts, strict=True)
    arrays = {name: np.array(one, np.int64) for name, one in columns.items()}
    return RoutedMatrices(**arrays | {"shift": arrays["shift"].astype(type_of_rows)})


def naive(lists, matrices, num_groups, num_keys):
    """{key: [(target, rows)]}: the bags that ranks are asked for, in the order of the message."""
    bags = {key: [] for key in range(num_keys)}
    for i, row in enumerate(lists):
        for matrix in matrices:
            of_parts = {}
            for one in row[matrix["table"]]:
                place = one // matrix["divisor"]
                place = place % matrix["modulus"] if matrix["modulus"] else place
                part = [part for part in matrix["parts"] if part[0] <= place][-1]
                of_parts.setdefault(part, []).append(place + part[2])
            for (_, rank, _), rows in of_parts.items():  # as they come first in the bag
                target = i * matrix["num_slots"] + matrix["slot"]
                bags[rank * num_groups + matrix["group"]].append((target, rows))
    return bags


@pytest.mark.parametrize("type_of_rows", [np.int32, np.int64])
@pytest.mark.parametrize("longest", [1, 6])
@pytest.mark.parametrize("seed", range(40))
def test_rows_are_sorted_as_loops_over_bags_sort_them(seed, longest, type_of_rows):
    """Bags of one id, or of none to five, some ids of which come twice."""
    random = np.random.default_rng(seed)
    num_ranks, num_groups, num_tables = random.integers(1, 5, 3).tolist()
    matrices, ids_of = draw_matrices(random, num_tables, num_ranks, num_groups)
    num_rows, num_keys = random.integers(0, 9), num_ranks * num_groups
    lists = [
        [random.integers(0, n, 1 if longest == 1 else random.integers(longest)).tolist()
         for n in ids_of]
        for _ in range(num_rows)
    ]  # fmt: skip
    lengths = np.array([[len(bag) for bag in row] for row in lists], np.int64)
    lengths = lengths.reshape(num_rows, num_tables)
    ids = np.array([one for row in lists for bag in row for one in bag], np.int64)
    begins = lengths.cumsum().reshape(lengths.shape) - lengths
    if type_of_rows is np.int64:
        for matrix in matrices:
            matrix["parts"] = [(*part[:2], part[2] + (1 << 40)) for part in matrix["parts"]]
    arrays = as_arrays(matrices, type_of_rows)
    found = route(ids, begins, lengths, arrays, num_groups, num_keys)

    wanted = naive(lists, matrices, num_groups, num_keys)
    assert found.num_bags.tolist() == [len(bags) for bags in wanted.values()]
    assert found.num_rows.tolist() == [sum(len(r) for _, r in bags) for bags in wanted.values()]
    in_order = [bag for bags in wanted.values() for bag in bags]
    assert found.targets.tolist() == [target for target, _ in in_order]
    assert found.lengths.tolist() == [len(rows) for _, rows in in_order]
    assert found.rows.tolist() == [one for _, rows in in_order for one in rows]
    assert found.rows.dtype == type_of_rows


def test_without_matrices_that_travel_no_rank_is_asked():
    """All matrices are on every rank."""
    none = RoutedMatrices(*[np.empty(0, np.int64)] * 6, np.zeros(1, np.int64),
                          *[np.empty(0, np.int64)] * 3)  # fmt: skip
    one = np.ones((3, 1), np.int64)
    found = route(np.zeros(3, np.int64), one.cumsum(0) - one, one, none, 1, 2)
    assert [len(found.rows), len(found.targets)] == [0, 0]
    assert found.num_bags.tolist() == found.num_rows.tolist() == [0, 0]
