"""The lines of --print-plan, read as a user reads them."""

import re

from ranks.placement import EVERY_RANK, LogicalTable, Matrix, Part, Placement
from ranks.plan import Plan
from ranks.plan_costs import Workload
from reporting.plan_table import plan_lines


def tables_of(num_rows, dim=64):
    return [
        LogicalTable(rows, dim, (Matrix(table, f"{table}.weight", rows, dim, bound=1.0),))
        for table, rows in enumerate(num_rows)
    ]


def plan_of(num_rows, shares, world_size, **more):
    """A plan in which table k has the shares (rank, rows) of shares[k]."""
    tables, parts = tables_of(num_rows), []
    for table, spans in zip(tables, shares, strict=True):
        begin = 0
        for rank, rows in spans:
            parts.append(Part(table.matrices[0], begin, begin + rows, rank))
            begin += rows
    workload = Workload(more.pop("rows", 2000), num_dense=1000)
    return Plan(tables, "auto", Placement(tuple(parts), world_size), workload, **more)


SMALL = plan_of(
    [3_000_000, 1_000_000, 100],
    [[(0, 2_000_000), (1, 1_000_000)], [(1, 1_000_000)], [(EVERY_RANK, 100)]],
    world_size=2,
)


def cells(line):
    return re.split(r"  +", line.strip())


def test_a_small_plan_line_by_line():
    lines = plan_lines(SMALL)
    assert lines[0] == (
        "plan: 2 ranks on cards, 3 tables of 4,000,100 rows, D 64, --sharding=auto,"
        " 2,000 rows a step, 4 bytes for a number sent"
    )
    assert cells(lines[1]) == [
        "rank", "parts", "whole", "cut", "shared", "GB", "lookups/row", "MB sent/step", "ids",
        "vectors", "gradients", "dense sum",
    ]  # fmt: skip
    # rank 0 sends 1,000 rows' ids of two tables, rank 1's vectors, gradients of two parts
    assert cells(lines[2]) == [
        "0", "2", "0", "1", "1", "0.512", "1.50", "0.81", "0.008", "0.26", "0.51", "0.03",
    ]  # fmt: skip
    assert cells(lines[3]) == [
        "1", "3", "1", "1", "1", "0.512", "2.50", "0.80", "0.004", "0.51", "0.26", "0.03",
    ]  # fmt: skip
    assert cells(lines[4]) == [
        "largest/mean", "1.20", "1.00", "1.25", "1.00", "1.33", "1.33", "1.33", "1.00",
    ]  # fmt: skip
    assert lines[5:] == [
        "on every rank: table 2",
        "cut: table 0 over ranks 0-1",
        "a card needs 0.5121 GB for tables (rank 0), and more for the rest of a step",
    ]


def test_a_projection_is_no_table_on_every_rank():
    projection = Matrix(0, "0.proj.weight", 64, 8, 1.0, is_looked_up=False)
    vectors = Matrix(0, "0.embs.weight", 100_000, 8, 1.0)
    tables = [LogicalTable(100_000, 64, (vectors, projection), "project")]
    parts = (Part(vectors, 0, 100_000, 1), Part(projection, 0, 64, EVERY_RANK))
    plan = Plan(tables, "auto", Placement(parts, 2), Workload(8, is_routed=True))
    lines = plan_lines(plan)
    assert lines[0].startswith("plan: 2 ranks on CPUs, 1 table of 100,000 rows, D 64")
    assert lines[-1].startswith("a rank needs 0.003204 GB for tables (rank 1)")
    assert not [line for line in lines if "on every rank" in line]


def test_small_tables_have_two_digits_of_a_gigabyte():
    plan = plan_of([1000, 500], [[(0, 1000)], [(1, 500)]], 2)
    assert [cells(line)[5] for line in plan_lines(plan)[2:4]] == ["0.00026", "0.00013"]


def test_columns_are_aligned():
    lines = plan_lines(SMALL)[1:5]
    assert len({len(line) for line in lines}) == 1
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", lines[0])]
    assert all(line[end - 1] != " " for line in lines[1:3] for end in ends[1:])


def test_whether_it_fits_the_memory_of_a_card():
    fits = Plan(SMALL.tables, "auto", SMALL.placement, SMALL.workload, card_bytes=0.6e9)
    assert plan_lines(fits)[-1] == "fits --card-memory=0.6 GB: tables take 0.5121 GB on rank 0"
    too_large = Plan(SMALL.tables, "auto", SMALL.placement, SMALL.workload, card_bytes=0.5e9)
    assert plan_lines(too_large)[-1] == (
        "does not fit --card-memory=0.5 GB: tables take 0.5121 GB on rank 0; 3 ranks would do"
    )


def rank_names(lines):
    begin = next(k for k, line in enumerate(lines) if line.startswith("rank"))
    end = next(k for k, line in enumerate(lines) if line.startswith("largest/mean"))
    return [line.split()[0] for line in lines[begin + 1 : end]]


def test_up_to_64_ranks_have_a_line_each_and_more_are_put_together_if_they_are_equal():
    for world_size in (64, 65):
        shares = [[(rank, 1000) for rank in range(world_size)], [(40, 9_000_000)]]
        plan = plan_of([1000 * world_size, 9_000_000], shares, world_size, rows=world_size)
        wanted = [str(rank) for rank in range(64)] if world_size == 64 else ["0-39", "40", "41-64"]
        assert rank_names(plan_lines(plan)) == wanted


def test_of_very_many_unequal_ranks_the_ends_and_the_extremes_are_shown():
    sizes = [1_000_000 + 9_000 * (rank * 37 % 200) for rank in range(200)]
    sizes[100], sizes[150] = 9_000_000, 5_000
    plan = plan_of([sum(sizes)], [list(enumerate(sizes))], 200, rows=200)
    names = rank_names(plan_lines(plan))
    assert names == [*map(str, range(8)), "...", "100", "...", "150", "...",
                     *map(str, range(192, 200))]  # fmt: skip


def test_cut_tables_over_the_same_ranks_share_a_line():
    half = [(0, 5), (1, 5)]
    plan = plan_of([10, 10, 4, 10, 10], [half, half, [(2, 4)], half, [(1, 5), (3, 5)]], 4)
    cuts = [line for line in plan_lines(plan) if line.startswith("cut")]
    assert cuts == ["cut: tables 0-1, 3 over ranks 0-1", "cut: table 4 over ranks 1, 3"]


def test_hundreds_of_cut_tables_do_not_hide_the_rest():
    shares = [[(table, 5), (table + 1, 5)] for table in range(100)]
    lines = plan_lines(plan_of([10] * 100, shares, 101, rows=101))
    assert len([line for line in lines if line.startswith("cut")]) == 65
    assert lines[-2] == "cut: 36 more"
