"""Whole tables are spread over ranks by their number, then by their rows."""

from ranks.placement import EVERY_RANK, LogicalTable, Matrix, Part, Placement, place_tables

NUM_ROWS = [5, 100, 7, 90, 1]


def tables_of(num_rows, dim=4):
    return [
        LogicalTable(rows, dim, (Matrix(table, f"{table}.weight", rows, dim, bound=1.0),))
        for table, rows in enumerate(num_rows)
    ]


def test_matrices_keep_their_order_and_those_of_a_table_are_on_one_rank():
    tables = tables_of(NUM_ROWS)
    pair = Matrix(2, "2.weight_r", 2, 4, bound=1.0)
    tables[2] = LogicalTable(7, 4, (*tables[2].matrices, pair), "mult")
    placement = place_tables(tables, world_size=2)
    matrices = [matrix for table in tables for matrix in table.matrices]
    assert [part.matrix for part in placement.parts] == matrices
    assert all(part.is_whole and (part.begin, part.end) == (0, part.num_rows)
               for part in placement.parts)  # fmt: skip
    assert len({part.rank for part in placement.parts if part.matrix.table == 2}) == 1
    assert not placement.is_cut


def ranks_of(tables, world_size):
    return [part.rank for part in place_tables(tables, world_size).parts]


def test_ranks_hold_as_many_tables_then_as_many_numbers():
    # 100 to rank 0, 90 to rank 1; 7 to rank 1 with fewer rows, 5 to rank 0; 1 to rank 1
    assert ranks_of(tables_of(NUM_ROWS), 2) == [0, 0, 1, 1, 1]
    assert ranks_of(tables_of(NUM_ROWS), 1) == [0] * 5
    small_rows = tables_of([100], dim=1) + tables_of([50, 30])
    assert ranks_of(small_rows, 3) == [2, 0, 1]


def test_with_fewer_tables_than_ranks_some_ranks_hold_none():
    assert sorted(ranks_of(tables_of([3, 2]), 8)) == [0, 1]


def test_a_projection_is_on_every_rank_if_there_are_several():
    projection = Matrix(0, "0.proj.weight", 4, 2, bound=1.0, is_looked_up=False)
    tables = [LogicalTable(9, 4, (Matrix(0, "0.embs.weight", 9, 2, 1.0), projection), "project")]
    assert ranks_of(tables, 2) == [0, EVERY_RANK]
    assert ranks_of(tables, 1) == [0, 0]


def test_parts_of_a_cut_matrix():
    cut, whole = (table.matrices[0] for table in tables_of([10, 3]))
    parts = (Part(cut, 0, 6, 0), Part(cut, 6, 10, 1), Part(whole, 0, 3, EVERY_RANK))
    placement = Placement(parts, world_size=2)
    assert placement.is_cut
    assert placement.parts_of(cut) == parts[:2] and placement.parts_of(whole) == parts[2:]
    assert [part.num_rows for part in parts] == [6, 4, 3]
    assert [part.is_whole for part in parts] == [False, False, True]
    assert [part.is_shared for part in parts] == [False, False, True]
    assert [[part.is_on(rank) for rank in (0, 1)] for part in parts] == [
        [True, False],
        [False, True],
        [True, True],
    ]
