"""Plans hold every row once, have equal loads, and cut or share where that is worth it."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, groupby, product
from pathlib import Path

import pytest

from common.errors import UserError
from ranks import plan
from ranks.placement import EVERY_RANK, LogicalTable, Matrix, Part, Placement, place_tables
from ranks.plan import Plan, fewest_ranks
from ranks.plan_costs import Workload, fullest_rank, no_state, rank_costs
from ranks.planner import is_shared, plan_tables

# rows of Criteo's tables at --max-ind-range of 10 and 40 million
CRITEO_10M = (
    9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208,
    11156, 122, 4, 970, 14, 9994222, 7267859, 9946608, 415421, 12420, 101, 36,
)  # fmt: skip
CRITEO_40M = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208,
    11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip


def all_of(matrix):
    return matrix.dim


def one(matrix):
    return 1


STATES = (no_state, all_of, one)  # sgd, adagrad, rwsadagrad


def tables_of(num_rows, dim=64):
    return [
        LogicalTable(rows, dim, (Matrix(table, f"{table}.weight", rows, dim, bound=1.0),))
        for table, rows in enumerate(num_rows)
    ]


def check_every_row_is_held_once(placement, tables):
    matrices = [matrix for table in tables for matrix in table.matrices]
    groups = [list(parts) for _, parts in groupby(placement.parts, lambda part: part.matrix.key)]
    assert [parts[0].matrix for parts in groups] == matrices
    for parts in groups:
        ranks = [part.rank for part in parts]
        assert all(0 <= rank < placement.world_size for rank in ranks) or ranks == [EVERY_RANK]
        assert len(set(ranks)) == len(ranks)
        assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == parts[0].matrix.num_rows
        assert all(part.num_rows > 0 for part in parts)


def loads_of(placement, workload):
    """(bytes of the fullest rank over the mean, lookups of the busiest one above the mean)."""
    costs = rank_costs(placement, workload)
    held, lookups = [cost.bytes_held for cost in costs], [cost.lookups for cost in costs]
    return max(held) * len(held) / sum(held), max(lookups) - sum(lookups) / len(lookups)


@pytest.mark.parametrize(
    "num_rows",
    [
        pytest.param(CRITEO_10M, id="10M", marks=pytest.mark.slow),
        pytest.param(CRITEO_40M, id="40M"),
    ],
)
def test_criteos_tables_are_balanced_on_2_to_64_ranks(num_rows):
    kinds = cycle(product((False, True), (False, True), (4, 2), STATES))
    for world_size, dim in product(range(2, 65), (64, 128)):
        grows, is_routed, wire_bytes, state = next(kinds)
        rows = 32768 * world_size if grows else 32768
        workload = Workload(rows, 1, wire_bytes, is_routed, state, num_dense=500_000)
        tables = tables_of(num_rows, dim)
        placement = plan_tables(tables, world_size, "auto", workload)
        check_every_row_is_held_once(placement, tables)
        over, lookups = loads_of(placement, workload)
        assert over <= 1.1 and lookups <= 1 + 1e-9, (world_size, workload, over, lookups)


@pytest.mark.parametrize("num_rows", [CRITEO_10M, CRITEO_40M], ids=["10M", "40M"])
def test_criteos_17_smallest_tables_are_shared_at_32768_rows_a_rank(num_rows):
    smallest = sorted(range(26), key=num_rows.__getitem__)[:17]
    placement = plan_tables(tables_of(num_rows), 8, "auto", Workload(8 * 32768))
    shared = [part.matrix.table for part in placement.parts if part.is_shared]
    assert shared == sorted(smallest)


def test_a_table_is_shared_exactly_where_that_sends_fewer_bytes():
    def sent(rank):
        costs = rank_costs(Placement((Part(matrix, 0, num_rows, rank),), 4), workload)
        return sum(cost.bytes_sent for cost in costs)

    found = set()
    for num_rows, ids, wire_bytes, pooling in product(range(40, 140), (1, 6), (2, 4), (0, 1)):
        matrix = Matrix(0, "0.weight", num_rows, 64, 1.0)
        workload = Workload(400, ids, wire_bytes, pooling_numbers=pooling)
        shared = is_shared(matrix, 4, workload)
        assert shared == (sent(EVERY_RANK) < sent(0))
        found.add(shared)
    assert found == {True, False}


def test_a_projection_is_on_every_rank_whatever_the_sharding():
    projection = Matrix(0, "0.proj.weight", 64, 8, 1.0, is_looked_up=False)
    vectors = Matrix(0, "0.embs.weight", 100_000, 8, 1.0)
    tables = [LogicalTable(100_000, 64, (vectors, projection), "project")]
    for sharding in ("auto", "table", "row"):
        placement = plan_tables(tables, 4, sharding, Workload(8))
        check_every_row_is_held_once(placement, tables)
        assert [part.rank for part in placement.parts_of(projection)] == [EVERY_RANK]
        assert not any(part.is_shared for part in placement.parts_of(vectors))


@pytest.mark.parametrize("sharding", ["auto", "table", "row"])
def test_one_rank_holds_everything_whole(sharding):
    projection = Matrix(3, "3.proj.weight", 64, 8, 1.0, is_looked_up=False)
    table = LogicalTable(9, 64, (Matrix(3, "3.embs.weight", 9, 8, 1.0), projection), "project")
    tables = [*tables_of([3, 5_000_000, 70]), table]
    placement = plan_tables(tables, 1, sharding, Workload(4096))
    check_every_row_is_held_once(placement, tables)
    assert {part.rank for part in placement.parts} == {0} and not placement.is_cut


def test_sharding_by_tables_is_that_of_place_tables():
    tables = tables_of(CRITEO_10M)
    assert plan_tables(tables, 8, "table", Workload(4096)) == place_tables(tables, 8)


def test_sharding_by_rows_cuts_every_table_into_shares_of_equal_rows():
    tables = tables_of([10, 3, 4_000_001])
    placement = plan_tables(tables, 4, "row", Workload(1_000_000))
    check_every_row_is_held_once(placement, tables)
    shares = [[(part.rank, part.num_rows) for part in placement.parts_of(table.matrices[0])]
              for table in tables]  # fmt: skip
    assert shares == [
        [(0, 3), (1, 3), (2, 2), (3, 2)],
        [(0, 1), (1, 1), (2, 1)],
        [(0, 1_000_001), (1, 1_000_000), (2, 1_000_000), (3, 1_000_000)],
    ]


def test_nothing_is_cut_if_whole_tables_have_equal_loads():
    tables = tables_of([900_000, 500_000, 1_000_000, 510_000, 120_000, 980_000])
    placement = plan_tables(tables, 2, "auto", Workload(64))
    assert not placement.is_cut
    over, lookups = loads_of(placement, Workload(64))
    assert over <= 1.1 and lookups <= 1


def test_tables_too_small_to_matter_are_neither_cut_nor_looked_up_on_one_rank():
    """26 tables of 1,000 rows: cutting them would send 20 times the bytes to save some kB."""
    tables = tables_of([1000] * 26)
    for world_size in (3, 8, 512):
        placement = plan_tables(tables, world_size, "auto", Workload(world_size * 4))
        check_every_row_is_held_once(placement, tables)
        assert not placement.is_cut
        assert loads_of(placement, Workload(world_size * 4))[1] <= 1


def test_a_single_table_and_one_of_fewer_rows_than_ranks():
    placement = plan_tables(tables_of([8_000_000]), 8, "auto", Workload(4096))
    assert [(part.rank, part.num_rows) for part in placement.parts] == [
        (rank, 1_000_000) for rank in range(8)
    ]
    wide = tables_of([5], dim=2_000_000)
    placement = plan_tables(wide, 8, "auto", Workload(8))
    check_every_row_is_held_once(placement, wide)
    assert [part.num_rows for part in placement.parts] == [1] * 5


def test_a_table_of_quotients_and_remainders_may_be_on_several_ranks():
    pair = (
        Matrix(0, "0.weight_q", 3_000_000, 32, 1.0, divisor=4),
        Matrix(0, "0.weight_r", 4, 32, 1.0, modulus=4),
    )
    tables = [LogicalTable(12_000_000, 64, pair, "concat"), *tables_of([1_000_000, 40_000])]
    placement = plan_tables(tables, 4, "auto", Workload(4 * 2048))
    check_every_row_is_held_once(placement, tables)
    assert [part.rank for part in placement.parts_of(pair[1])] == [EVERY_RANK]
    assert len(placement.parts_of(pair[0])) > 1
    over, lookups = loads_of(placement, Workload(4 * 2048))
    assert over <= 1.1 and lookups <= 1


def test_tables_with_bags_of_more_ids_weigh_more():
    """The two tables that look up 20 ids are not on one rank, though the four are equally large."""
    tables = tables_of([1_000_000] * 4)
    workload = Workload(64, ids_per_bag=(20, 1, 20, 1))
    placement = plan_tables(tables, 2, "auto", workload)
    assert [cost.lookups for cost in rank_costs(placement, workload)] == [21, 21]


def test_mlperfs_bags_of_1_to_100_ids_are_balanced_to_a_table():
    ids = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
    for is_routed in (False, True):
        workload = Workload(8 * 8192, ids, is_routed=is_routed, state_numbers=one)
        placement = plan_tables(tables_of(CRITEO_40M, 128), 8, "auto", workload)
        over, lookups = loads_of(placement, workload)
        assert over <= 1.1 and lookups <= 100


def test_ranks_have_equally_many_parts_too_if_ids_are_routed():
    """A part with few of a table's rows has few lookups, but is one more to call and to answer."""
    for world_size in (8, 23, 64):
        workload = Workload(32768, is_routed=True)
        costs = rank_costs(
            plan_tables(tables_of(CRITEO_10M), world_size, "auto", workload), workload
        )
        num_parts = [cost.num_parts for cost in costs]
        assert max(num_parts) <= sum(num_parts) / world_size + 1


def test_random_tables_are_balanced_on_up_to_512_ranks():
    draw = random.Random(22)
    for world_size, num_tables in ((2, 2), (3, 300), (16, 5), (100, 40), (512, 26), (512, 3)):
        tables = tables_of([int(10 ** draw.uniform(0, 8)) for _ in range(num_tables)], 128)
        workload = Workload(world_size * 1024, is_routed=world_size == 16, state_numbers=one)
        placement = plan_tables(tables, world_size, "auto", workload)
        check_every_row_is_held_once(placement, tables)
        over, lookups = loads_of(placement, workload)
        assert over <= 1.1 and lookups <= 1 + 1e-9, (world_size, num_tables, over, lookups)


def test_a_rank_has_at_most_one_cut_more_than_there_are_tables():
    """Each rank but the last cuts one table, so parts are at most tables and ranks less one."""
    for world_size in (4, 13, 64):
        placement = plan_tables(tables_of(CRITEO_40M), world_size, "auto", Workload(32768))
        travelling = [part for part in placement.parts if not part.is_shared]
        matrices = {part.matrix.key for part in travelling}
        assert len(travelling) <= len(matrices) + world_size - 1


def test_the_same_input_has_the_same_plan_in_every_process():
    """Whatever order its sets have."""
    program = (
        "from test_planner import *;"
        "plan = plan_tables(tables_of([*CRITEO_10M, *CRITEO_10M]), 24, 'auto', Workload(32768));"
        "print([(part.matrix.key, part.begin, part.end, part.rank) for part in plan.parts])"
    )
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[3])])
    plans = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(plans) == 1


def error_of(*args):
    with pytest.raises(UserError) as caught:
        Plan.make(*args).check()
    return str(caught.value)


def test_what_does_not_fit_says_how_many_ranks_would_do():
    tables, workload = tables_of(CRITEO_10M), Workload(32768)
    assert error_of(tables, 2, "auto", workload, 4e9) == (
        "tables need 6.305 GB on rank 0, --card-memory=4 GB: 4 ranks would do"
    )
    placement = plan_tables(tables, 4, "auto", workload, 4e9)
    assert fullest_rank(rank_costs(placement, workload))[1].bytes_held <= 4e9
    assert error_of(tables_of([1000]), 2, "table", Workload(64), 1.5e5).endswith(
        "no number of ranks up to 512 would do; with --sharding=auto 2 ranks would"
    )
    assert "0.0015 GB: no number of ranks up to 512 would do" in error_of(
        tables, 8, "row", workload, 1.5e6
    )
    # a row is larger than such a card
    assert error_of(tables_of([2]), 2, "row", Workload(64), 200).endswith("up to 512 would do")


def test_a_plan_that_fits_comes_before_one_that_cuts_less():
    """Whole tables differ by 10 % at most, which is balanced, but the larger is too large here."""
    tables = tables_of([1_000_000, 950_000])
    assert not plan_tables(tables, 2, "auto", Workload(64)).is_cut
    assert plan_tables(tables, 2, "auto", Workload(64), 0.2525e9).is_cut


@pytest.mark.parametrize("sharding", ["auto", "table", "row"])
def test_the_fewest_ranks_are_enough_and_one_less_is_not(sharding):
    tables, workload = tables_of([1_000_000, 400_000, 300_000, 90_000, 3]), Workload(512)
    for card_bytes in (0.26e9, 0.3e9, 0.4e9):
        enough = fewest_ranks(tables, sharding, workload, card_bytes)
        Plan.make(tables, enough, sharding, workload, card_bytes).check()
        with pytest.raises(UserError, match=f": {enough} rank"):
            Plan.make(tables, enough - 1, sharding, workload, card_bytes).check()


@pytest.mark.parametrize(
    "num_rows, rows, ranks, card_bytes",
    [
        ([900_000] * 8, 8_388_608, 8, 1e9),  # all of them are worth sharing
        ([30_000] * 100, 262_144, 8, 0.2e9),
        ([1_000_000, 950_000], 64, 2, 0.2525e9),
    ],
)
def test_auto_fits_wherever_whole_or_cut_tables_do(num_rows, rows, ranks, card_bytes):
    tables, workload = tables_of(num_rows), Workload(rows)
    fits = {
        sharding: Plan.make(tables, ranks, sharding, workload, card_bytes).fits
        for sharding in ("table", "row", "auto")
    }
    assert fits["auto"] and (fits["table"] or fits["row"])


def test_auto_fits_random_tables_wherever_whole_or_cut_ones_do():
    draw = random.Random(5)
    found = 0
    for _ in range(60):
        num_rows = [int(10 ** draw.uniform(0, 6.5)) for _ in range(draw.randrange(1, 20))]
        tables, ranks = tables_of(num_rows), draw.randrange(2, 12)
        workload = Workload(int(10 ** draw.uniform(2, 7)), is_routed=draw.random() < 0.5)
        card_bytes = 256 * sum(num_rows) / ranks * draw.uniform(1.0, 2.0)
        plans = [Plan.make(tables, ranks, way, workload, card_bytes) for way in ("table", "row")]
        if any(plan.fits for plan in plans):
            assert Plan.make(tables, ranks, "auto", workload, card_bytes).fits
            default = Plan.make(tables, ranks, "auto", workload)
            found += not replace(default, card_bytes=card_bytes).fits
    assert found > 5


def test_a_search_for_ranks_that_finds_none_soon_ends(monkeypatch):
    planned = []
    real = plan.plan_tables
    monkeypatch.setattr(plan, "plan_tables", lambda *args: planned.append(args[1]) or real(*args))
    card_bytes = 256 * 117.2  # of 117.19 rows on 512 ranks, each of which has whole ones
    assert fewest_ranks(tables_of([600] * 100), "auto", Workload(32768), card_bytes) is None
    assert len(planned) < 20 and max(planned) == 512
