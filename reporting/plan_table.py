"""What --print-plan prints: where a plan puts the tables, and what that costs each rank."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from ranks.placement import Placement
from ranks.plan import Plan
from ranks.plan_costs import RankCost, fullest_rank

_MOST_LINES = 64  # of ranks, and of cut tables
_ENDS = 8  # ranks that are shown at either end where there are too many

_HEADS = ("parts", "whole", "cut", "shared", "GB", "lookups/row", "MB sent/step", "ids", "vectors",
          "gradients", "dense sum")  # fmt: skip
_KINDS = ("whole", "cut", "shared")  # of parts, of which a rank may well have none
_DIGITS = (0, 0, 0, 0, 3, 2, 2, 2, 2, 2, 2)


def plan_lines(plan: Plan) -> list[str]:
    """The lines that --print-plan prints."""
    return [
        _head(plan), *_rank_lines(plan.costs), *_tables_lines(plan.placement), _memory(plan)
    ]  # fmt: skip


def _head(plan: Plan) -> str:
    num_ranks, tables, workload = plan.placement.world_size, plan.tables, plan.workload
    num_rows = sum(table.num_rows for table in tables)
    return (
        f"plan: {_count(num_ranks, 'rank')} on {'CPUs' if workload.is_routed else 'cards'},"
        f" {_count(len(tables), 'table')} of {num_rows:,} rows,"
        f" D {tables[0].dim}, --sharding={plan.sharding}, {workload.rows:,} rows a step,"
        f" {workload.wire_bytes} bytes for a number sent"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _numbers(cost: RankCost) -> tuple[float, ...]:
    """The columns of a rank, as _HEADS names them."""
    megabytes = (cost.bytes_sent, cost.ids_sent, cost.vectors_sent, cost.gradients_sent)
    return (
        cost.num_parts,
        cost.num_whole,
        cost.num_cut,
        cost.num_shared,
        cost.bytes_held / 1e9,
        cost.lookups,
        *(sent / 1e6 for sent in (*megabytes, cost.dense_sent)),
    )


def _rank_lines(costs: Sequence[RankCost]) -> list[str]:
    """The table of ranks, with the largest number of each column over its mean at its end."""
    numbers = [_numbers(cost) for cost in costs]
    texts = [
        tuple(_text(value, digits) for value, digits in zip(row, _DIGITS, strict=True))
        for row in numbers
    ]
    means = [sum(column) / len(costs) for column in zip(*numbers, strict=True)]
    over = tuple(
        "" if head in _KINDS or not mean else f"{max(column) / mean:.2f}"
        for head, column, mean in zip(_HEADS, zip(*numbers, strict=True), means, strict=True)
    )
    shown = _every_rank(texts) if len(costs) <= _MOST_LINES else _some_ranks(texts, numbers)
    rows = [("rank", _HEADS), *shown, ("largest/mean", over)]
    widths = [max(len(row[k]) for _, row in rows) for k in range(len(_HEADS))]
    names = max(len(name) for name, _ in rows)
    return [
        "  ".join([f"{name:<{names}}", *map(str.rjust, row, widths)]).rstrip() for name, row in rows
    ]


def _text(value: float, digits: int) -> str:
    """The number with so many digits behind the point, or two that count if it is smaller."""
    return f"{value:.2g}" if digits and 0 < value < 10.0**-digits else f"{value:,.{digits}f}"


_Rows = list[tuple[str, tuple[str, ...]]]  # (rank or ranks, columns as text)


def _every_rank(texts: Sequence[tuple[str, ...]]) -> _Rows:
    return [(str(rank), row) for rank, row in enumerate(texts)]


def _some_ranks(texts: Sequence[tuple[str, ...]], numbers: Sequence[tuple[float, ...]]) -> _Rows:
    """One line for equal ranks that follow one another; the ends and extremes of very many."""
    groups: list[tuple[int, int]] = []  # first and last rank
    for _, group in groupby(range(len(texts)), key=texts.__getitem__):
        ranks = list(group)
        groups.append((ranks[0], ranks[-1]))
    if len(groups) > _MOST_LINES:
        columns = list(zip(*numbers, strict=True))
        extremes = {column.index(most(column)) for column in columns for most in (min, max)}
        groups = [
            group
            for k, group in enumerate(groups)
            if k < _ENDS
            or k >= len(groups) - _ENDS
            or any(group[0] <= rank <= group[1] for rank in extremes)
        ]
    rows = [(_span(begin, end), texts[begin]) for begin, end in groups]
    for place in reversed([k for k, (a, b) in enumerate(pairwise(groups), 1) if b[0] - a[1] > 1]):
        rows.insert(place, ("...", ("",) * len(_HEADS)))
    return rows


def _span(begin: int, end: int) -> str:
    return f"{begin}-{end}" if end > begin else str(begin)


def spans(numbers: Iterable[int]) -> str:
    """Numbers in order, those that follow one another as one: 0-3, 7."""
    ordered = sorted(set(numbers))
    starts = [k for k, number in enumerate(ordered) if not k or number - ordered[k - 1] > 1]
    ends = [*(k - 1 for k in starts[1:]), len(ordered) - 1]
    return ", ".join(
        _span(ordered[a], ordered[b]) for a, b in zip(starts, ends, strict=True)
    )  # fmt: skip


def _tables_lines(placement: Placement) -> list[str]:
    """Which tables are shared, and over which ranks others are cut.

    A table that consists of several matrices is in each list that one of them is in. A projection
    is in none: it is a dense parameter, as an MLP's.
    """
    shared = {
        part.matrix.table for part in placement.parts if part.is_shared and part.matrix.is_looked_up
    }
    ranks_of: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for part in placement.parts:
        if not part.is_whole:
            ranks_of[part.matrix.table, part.matrix.key].append(part.rank)
    tables_over: defaultdict[str, list[int]] = defaultdict(list)
    for (table, _), ranks in ranks_of.items():
        tables_over[spans(ranks)].append(table)
    lines = [f"on every rank: {_tables(shared)}"] if shared else []
    cuts = [f"cut: {_tables(tables)} over ranks {ranks}" for ranks, tables in tables_over.items()]
    lines += cuts[:_MOST_LINES]
    return lines + ([f"cut: {len(cuts) - _MOST_LINES} more"] if len(cuts) > _MOST_LINES else [])


def _tables(tables: Iterable[int]) -> str:
    numbers = set(tables)
    return f"{'table' if len(numbers) == 1 else 'tables'} {spans(numbers)}"


def _memory(plan: Plan) -> str:
    """Whether a card's memory is enough, or how much it has to have."""
    rank, cost = fullest_rank(plan.costs)
    needed = f"{cost.bytes_held / 1e9:.4g} GB"
    if plan.card_bytes is None:
        who = "rank" if plan.workload.is_routed else "card"
        return f"a {who} needs {needed} for tables (rank {rank}), and more for the rest of a step"
    given = f"--card-memory={plan.card_bytes / 1e9:g} GB: tables take {needed} on rank {rank}"
    if plan.fits:
        return f"fits {given}"
    return f"does not fit {given}; {plan.what_would_do(plan.card_bytes)}"
