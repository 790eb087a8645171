"""Tables are spread over ranks by their number, then by their rows."""

from ranks.placement import place_tables

NUM_ROWS = [5, 100, 7, 90, 1]


def test_tables_keep_their_order_and_each_is_one_part_with_all_its_rows():
    tables = place_tables(NUM_ROWS, dim=4, world_size=2)
    assert [table.num_rows for table in tables] == NUM_ROWS
    for number, table in enumerate(tables):
        (part,) = table.parts
        assert (part.table, part.key) == (number, f"{number}.weight")
        assert (part.begin, part.end, part.num_rows) == (0, table.num_rows, table.num_rows)
        assert part.dim == 4


def ranks_of(num_rows, world_size):
    return [table.parts[0].rank for table in place_tables(num_rows, 4, world_size)]


def test_ranks_hold_as_many_tables_then_as_many_rows():
    # 100 to rank 0, 90 to rank 1; 7 to rank 1 with fewer rows, 5 to rank 0; 1 to rank 1
    assert ranks_of(NUM_ROWS, 2) == [0, 0, 1, 1, 1]
    assert ranks_of(NUM_ROWS, 1) == [0] * 5


def test_with_fewer_tables_than_ranks_some_ranks_hold_none():
    assert sorted(ranks_of([3, 2], 8)) == [0, 1]
