"""Rows are split into consecutive shares, as equal as they can be."""

from common.shares import share_of_rows, split_evenly


def test_the_first_shares_have_a_row_more():
    assert split_evenly(10, 4) == [3, 3, 2, 2]
    assert split_evenly(2, 4) == [1, 1, 0, 0]
    assert split_evenly(0, 2) == [0, 0]


def test_a_ranks_share_lies_behind_those_before_it():
    assert [share_of_rows(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_all_shares_together_are_the_split():
    for num_rows in range(12):
        for world_size in range(1, 6):
            ranges = [share_of_rows(num_rows, rank, world_size) for rank in range(world_size)]
            assert [end - begin for begin, end in ranges] == split_evenly(num_rows, world_size)
            assert ranges[0][0] == 0 and ranges[-1][1] == num_rows
