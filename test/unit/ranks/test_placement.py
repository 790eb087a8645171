"""Tables are spread over ranks by their number, then by their rows."""

from ranks.placement import LogicalTable, Part, place_tables

NUM_ROWS = [5, 100, 7, 90, 1]


def tables_of(num_rows, dim=4):
    return [
        LogicalTable(rows, dim, (Part(table, f"{table}.weight", 0, rows, dim, bound=1.0),))
        for table, rows in enumerate(num_rows)
    ]


def test_tables_keep_their_order_and_their_parts_get_a_rank():
    tables = tables_of(NUM_ROWS)
    pair = Part(4, "4.weight_r", 0, 2, 4, bound=1.0)
    tables[4] = LogicalTable(1, 4, (*tables[4].parts, pair), "mult")
    placed = place_tables(tables, world_size=2)
    assert [table.num_rows for table in placed] == NUM_ROWS
    for table, wanted in zip(placed, tables, strict=True):
        assert [part.key for part in table.parts] == [part.key for part in wanted.parts]
        assert {part.rank for part in table.parts} == {table.rank}


def ranks_of(num_rows, world_size):
    return [table.rank for table in place_tables(tables_of(num_rows), world_size)]


def test_ranks_hold_as_many_tables_then_as_many_numbers():
    # 100 to rank 0, 90 to rank 1; 7 to rank 1 with fewer rows, 5 to rank 0; 1 to rank 1
    assert ranks_of(NUM_ROWS, 2) == [0, 0, 1, 1, 1]
    assert ranks_of(NUM_ROWS, 1) == [0] * 5
    small_rows = tables_of([100], dim=1) + tables_of([50, 30])
    assert [table.rank for table in place_tables(small_rows, 3)] == [2, 0, 1]


def test_with_fewer_tables_than_ranks_some_ranks_hold_none():
    assert sorted(ranks_of([3, 2], 8)) == [0, 1]
