"""What a placement costs: equal to counting what each rank sends to each other one."""

from math import isclose

import pytest

from ranks.placement import EVERY_RANK, Matrix, Part, Placement
from ranks.plan_costs import Workload, fullest_rank, part_bytes, rank_costs

CUT = Matrix(0, "0.weight", 10, 8, bound=1.0)
WHOLE = Matrix(1, "1.weight", 6, 8, bound=1.0)
QUOTIENTS = Matrix(2, "2.weight_q", 7, 4, bound=1.0, divisor=4)
REMAINDERS = Matrix(2, "2.weight_r", 4, 4, bound=1.0, modulus=4)
SMALL = Matrix(3, "3.embs.weight", 3, 2, bound=1.0)
PROJECTION = Matrix(3, "3.proj.weight", 8, 2, bound=1.0, is_looked_up=False)
PLACEMENT = Placement(
    (
        Part(CUT, 0, 5, 0),
        Part(CUT, 5, 9, 1),
        Part(CUT, 9, 10, 2),
        Part(WHOLE, 0, 6, 2),
        Part(QUOTIENTS, 0, 7, 1),
        Part(REMAINDERS, 0, 4, 1),
        Part(SMALL, 0, 3, EVERY_RANK),
        Part(PROJECTION, 0, 8, EVERY_RANK),
    ),
    world_size=3,
)


def counted(placement, rows, ids_per_bag, wire_bytes):
    """(ids, vectors, gradients) that each rank sends, message by message, nothing routed."""
    world_size = len(rows)
    sent = [[0, 0, 0] for _ in rows]
    for r in range(world_size):
        for s in set(range(world_size)) - {r}:
            there = [part for part in placement.parts if part.rank == s]
            for table in {part.matrix.table for part in there}:
                sent[r][0] += 4 * rows[r] * ids_per_bag[table]
            for part in there:
                sent[r][2] += wire_bytes * rows[r] * part.matrix.dim
                sent[s][1] += wire_bytes * rows[r] * part.matrix.dim
    return [tuple(numbers) for numbers in sent]


@pytest.mark.parametrize("wire_bytes", [2, 4])
def test_bytes_of_the_static_exchange_are_those_of_all_messages(wire_bytes):
    ids = (1, 3, 2, 1)
    costs = rank_costs(PLACEMENT, Workload(20, ids, wire_bytes))
    wanted = counted(PLACEMENT, [7, 7, 6], ids, wire_bytes)
    got = [(cost.ids_sent, cost.vectors_sent, cost.gradients_sent) for cost in costs]
    assert got == wanted
    assert got[0] == (4 * 7 * (1 + 2 + 1 + 3), wire_bytes * 13 * 8, wire_bytes * 7 * 32)


def test_dense_gradients_are_sent_twice_but_for_a_share_of_each_rank():
    (cost, *others) = rank_costs(PLACEMENT, Workload(20, num_dense=100))
    numbers = 100 + 3 * 2 + 8 * 2  # the MLPs', the shared table's, the projection's
    assert isclose(cost.dense_sent, 2 * 2 / 3 * 4 * numbers)
    assert [other.dense_sent for other in others] == [cost.dense_sent] * 2
    assert cost.bytes_sent == sum(
        (cost.ids_sent, cost.vectors_sent, cost.gradients_sent, cost.dense_sent)
    )


def test_parts_and_lookups():
    costs = rank_costs(PLACEMENT, Workload(20, (1, 3, 2, 6)))
    assert [(cost.num_whole, cost.num_cut, cost.num_shared) for cost in costs] == [
        (0, 1, 2),
        (2, 1, 2),
        (1, 1, 2),
    ]
    assert [cost.num_parts for cost in costs] == [3, 5, 4]
    # a third of the rows look up 6 ids in the shared table on each rank
    assert [cost.lookups for cost in costs] == [2 + 1, 2 + 1 + 2 + 2, 2 + 1 + 3]


def test_bytes_held_are_vectors_state_pooling_and_gradients_of_shared_rows():
    (first, *_) = rank_costs(PLACEMENT, Workload(20))
    assert first.bytes_held == 4 * (5 * 8 + 3 * (2 + 2) + 8 * (2 + 2))
    adagrad = Workload(20, state_numbers=lambda matrix: matrix.dim)
    assert rank_costs(PLACEMENT, adagrad)[0].bytes_held == 4 * (80 + 3 * 6 + 8 * 6)
    row_wise = Workload(20, state_numbers=lambda matrix: 1, pooling_numbers=2)
    assert part_bytes(Part(CUT, 5, 9, 0), row_wise) == 4 * 4 * (8 + 1 + 2)
    # the pooling weight of a shared row has a gradient as well, a projection has no such weight
    assert part_bytes(Part(SMALL, 0, 3, EVERY_RANK), row_wise) == 4 * 3 * (2 + 1 + 2 + 2 + 1)
    assert part_bytes(Part(PROJECTION, 0, 8, EVERY_RANK), row_wise) == 4 * 8 * (2 + 1 + 2)


def test_a_cut_table_whose_ids_are_routed_costs_as_much_in_all_as_a_whole_one():
    routed = Workload(20, is_routed=True)
    cut = Placement((Part(CUT, 0, 4, 0), Part(CUT, 4, 10, 1)), 2)
    first, second = rank_costs(cut, routed)
    assert (first.lookups, second.lookups) == (0.4, 0.6)
    assert isclose(first.ids_sent, 4 * 10 * 0.6) and isclose(second.ids_sent, 4 * 10 * 0.4)
    assert isclose(first.vectors_sent, 4 * 10 * 8 * 0.4)
    assert isclose(first.gradients_sent, 4 * 10 * 8 * 0.6)
    whole = rank_costs(Placement((Part(CUT, 0, 10, 0),), 2), routed)
    total = sum(cost.bytes_sent for cost in whole)
    assert isclose(first.bytes_sent + second.bytes_sent, total)
    assert total < sum(cost.bytes_sent for cost in rank_costs(cut, Workload(20)))


def test_a_routed_bag_of_several_ids_is_answered_by_each_part_that_has_one_of_them():
    cut = Placement((Part(CUT, 0, 5, 0), Part(CUT, 5, 10, 1)), 2)
    first, _ = rank_costs(cut, Workload(20, ids_per_bag=2, is_routed=True))
    assert isclose(first.vectors_sent, 4 * 10 * 8 * 0.75)  # a quarter has both on the other rank
    assert first.lookups == 1 and first.ids_sent == 4 * 10 * 2 * 0.5


def test_lengths_of_bags_go_where_their_ids_go():
    """To each rank with a part, or with one of the bag's ids."""
    cut = Placement((Part(CUT, 0, 5, 0), Part(CUT, 5, 10, 1)), 2)
    for is_routed, numbers in ((False, 2 + 1), (True, 2 * 0.5 + 0.75)):
        workload = Workload(20, ids_per_bag=2, is_routed=is_routed, has_lengths=True)
        assert isclose(rank_costs(cut, workload)[0].ids_sent, 4 * 10 * numbers)


def test_one_rank_sends_nothing():
    (cost,) = rank_costs(Placement.of_whole([(CUT, 0), (PROJECTION, 0)], 1), Workload(20, 1))
    assert cost.bytes_sent == 0 and cost.lookups == 1 and cost.bytes_held == 4 * (80 + 16)


def test_the_fullest_rank_is_the_first_of_equal_ones():
    costs = rank_costs(Placement((Part(CUT, 0, 4, 0), Part(CUT, 4, 8, 1)), 3), Workload(3))
    assert fullest_rank(costs) == (0, costs[0])
