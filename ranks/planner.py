"""Plans which rank holds which rows: pure functions, the same plan on every rank."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from common.shares import share_of_rows
from ranks.placement import EVERY_RANK, LogicalTable, Matrix, Part, Placement, place_tables
from ranks.plan_costs import FLOAT_BYTES, ID_BYTES, RankCost, Workload, fullest_rank, rank_costs
from ranks.rank_filling import Load, Rule, cut_rows, one_part_each, whole_ranks

# How tables are spread over ranks:
#   auto   tiny ones are shared, others are whole or cut so that ranks have equal loads
#   table  every table is whole
#   row    every table is cut into equal shares for all ranks
Sharding = Literal["auto", "table", "row"]

MOST_BYTES = 1.1  # a balanced plan's fullest rank holds at most so many times the mean
UNNOTICED_BYTES = 1e6  # a rank that holds so little more than the mean is no reason for a cut

# All rules made of these are tried. With half of the tolerances, or without the lookups beside the
# mean, the rank that sends most sends up to 21 or 13 % more of Criteo's tables on 2 to 64 ranks.
_TOLERANCES = (0.0, 0.02, 0.05, 0.09)
_MORE_LOOKUPS = (0.0, 0.5, -0.5)
# A rank that need not answer for a table besides its own part sends half as much, so more tables
# than those that send less on the average are shared too, if that saves the fullest rank a part.
_SHARED_AT = (1, 2, 4)  # times the bytes of the exchange
# Fewer are shared where those do not fit; with 0 only projections, which all ranks have.
_SHARED_IN_NEED = (0.25, 0)


@dataclass(frozen=True)
class _Shares:
    """Rows of matrices on ranks, by the matrix's key: (rank, rows), in the order of the rows."""

    matrices: Sequence[Matrix]
    rows: dict[str, list[tuple[int, int]]]

    def placement(self, world_size: int) -> Placement:
        """The placement of these shares."""
        parts = []
        for matrix in self.matrices:
            begin = 0
            for rank, num_rows in self.rows[matrix.key]:
                parts.append(Part(matrix, begin, begin + num_rows, rank))
                begin += num_rows
        return Placement(tuple(parts), world_size)


def plan_tables(
    tables: Sequence[LogicalTable],
    world_size: int,
    sharding: Sharding,
    workload: Workload,
    card_bytes: float | None = None,
) -> Placement:
    """Where the rows of all tables are to be.

    Args:
        tables: all tables.
        world_size: number of ranks.
        sharding: how tables are spread.
        workload: of a step, which decides what a placement costs.
        card_bytes: bytes that tables may take on a rank, if that can be; None: as many as they
            need.
    """
    matrices = [matrix for table in tables for matrix in table.matrices]
    if world_size == 1:
        return Placement.of_whole(((matrix, 0) for matrix in matrices), world_size)
    if sharding == "table":
        return place_tables(tables, world_size)
    if sharding == "row":
        return _equal_shares(matrices, world_size)

    def rating(placement: Placement) -> tuple[bool, float, bool, bool, float, float]:
        return _rating(placement, workload, card_bytes)

    best = min(_candidates(matrices, world_size, workload, _SHARED_AT), key=rating)
    if card_bytes is None or most_held(best, workload) <= card_bytes:
        return best
    in_need = [best, place_tables(tables, world_size), _equal_shares(matrices, world_size)]
    for times in _SHARED_IN_NEED:
        in_need += _candidates(matrices, world_size, workload, (times,))
    return min(in_need, key=rating)


def most_held(placement: Placement, workload: Workload) -> int:
    """Bytes on the fullest rank."""
    return fullest_rank(rank_costs(placement, workload))[1].bytes_held


def _equal_shares(matrices: Sequence[Matrix], world_size: int) -> Placement:
    """Every matrix that is looked up is cut into shares of at most one row more than others."""
    shares = _Shares(matrices, _shares_of_all([one for one in matrices if not one.is_looked_up]))
    for matrix in matrices:
        if matrix.is_looked_up:
            spans = (share_of_rows(matrix.num_rows, k, world_size) for k in range(world_size))
            sizes = ((rank, end - begin) for rank, (begin, end) in enumerate(spans))
            shares.rows[matrix.key] = [(rank, size) for rank, size in sizes if size]
    return shares.placement(world_size)


def is_shared(matrix: Matrix, world_size: int, workload: Workload, times: float = 1) -> bool:
    """Whether every rank had better hold the whole matrix.

    A projection is a dense parameter, which all have. Other matrices are shared where that sends
    fewer bytes. Either way (W - 1) / W of the following is sent for each rank: by the dense sum the
    gradient of each row, twice; by the exchange, for each of the rank's B / W bags, 4 bytes for
    each id (and for how many there are), a vector and its gradient.

    Args:
        matrix: the matrix.
        world_size: W.
        workload: of a step.
        times: how many times the bytes of the exchange its sharing may send.
    """
    if not matrix.is_looked_up:
        return True
    summed = 2 * FLOAT_BYTES * matrix.num_rows * workload.gradient_numbers(matrix)
    whole_numbers = workload.ids_of(matrix) + workload.has_lengths
    exchanged = 2 * workload.wire_bytes * matrix.dim + ID_BYTES * whole_numbers
    return summed < times * exchanged * workload.rows / world_size


def _candidates(
    matrices: Sequence[Matrix], world_size: int, workload: Workload, shared_at: Sequence[float]
) -> Iterator[Placement]:
    """Plans of whole matrices, and of some that are cut in several ways; tiny ones are shared.

    Args:
        matrices: all of them.
        world_size: number of ranks.
        workload: of a step.
        shared_at: `times` of `is_shared`; only with the first one are all ways of cutting tried.
    """
    tried: list[list[Matrix]] = []
    for times in shared_at:
        shared = [one for one in matrices if is_shared(one, world_size, workload, times)]
        if shared not in tried:
            ways = () if tried else tuple(product(_TOLERANCES, _MORE_LOOKUPS))
            yield from _with_shared(matrices, shared, world_size, workload, ways)
            tried.append(shared)


def _with_shared(
    matrices: Sequence[Matrix],
    shared: Sequence[Matrix],
    world_size: int,
    workload: Workload,
    ways: Sequence[tuple[float, float]],
) -> Iterator[Placement]:
    """Plans in which some matrices are shared.

    Args:
        matrices: all of them.
        shared: those that are.
        world_size: number of ranks.
        workload: of a step.
        ways: tolerances, and lookups beside the mean, with which ranks are filled.
    """
    common = _shares_of_all(shared)
    loads = [
        Load(matrix, matrix.num_rows, workload.row_bytes(matrix), workload.ids_of(matrix))
        for matrix in matrices
        if matrix.key not in common
    ]
    if not loads:
        yield _Shares(matrices, common).placement(world_size)
        return
    whole = {
        load.matrix.key: [(rank, load.num_rows)]
        for load, rank in zip(loads, whole_ranks(loads, world_size), strict=True)
    }
    yield _Shares(matrices, common | whole).placement(world_size)
    if len(loads) <= world_size:
        yield _with_cuts(matrices, common, one_part_each(loads, world_size), world_size)
    # ranks may have equal numbers of parts, or of lookups, which differ where ids are routed
    for way, is_routed in product(ways, sorted({False, workload.is_routed})):
        rule = Rule(*way, is_routed)
        yield _with_cuts(matrices, common, cut_rows(loads, world_size, rule), world_size)


def _with_cuts(
    matrices: Sequence[Matrix],
    common: Mapping[str, list[tuple[int, int]]],
    cuts: Sequence[tuple[Matrix, int, int]],
    world_size: int,
) -> Placement:
    """The placement of shared matrices, and of (matrix, rank, rows) of all others."""
    rows = defaultdict(list, common)
    for matrix, rank, num_rows in cuts:
        rows[matrix.key].append((rank, num_rows))
    return _Shares(matrices, rows).placement(world_size)


def _shares_of_all(matrices: Sequence[Matrix]) -> dict[str, list[tuple[int, int]]]:
    return {matrix.key: [(EVERY_RANK, matrix.num_rows)] for matrix in matrices}


def _rating(
    placement: Placement, workload: Workload, card_bytes: float | None
) -> tuple[bool, float, bool, bool, float, float]:
    """The smallest is best: it fits, has equal loads, cuts nothing, and sends the fewest bytes.

    A part takes some time however few ids come to it, so ranks should have equally many of them. A
    step takes as long as the rank that sends most, whose bytes come before those of all.
    """
    costs = rank_costs(placement, workload)
    held = max(cost.bytes_held for cost in costs)
    num_parts = [cost.num_parts for cost in costs]
    alone = (part.matrix for part in placement.parts if not part.is_shared)
    most_ids = max((workload.ids_of(matrix) for matrix in alone), default=0)
    sent = [cost.bytes_sent for cost in costs]
    return (
        card_bytes is not None and held > card_bytes,
        _excess(costs, most_ids),
        placement.is_cut,
        max(num_parts) - sum(num_parts) / len(num_parts) > 1,
        max(sent),
        sum(sent),
    )


def _excess(costs: Sequence[RankCost], ids: float) -> float:
    """By which share of the mean the largest loads pass what a balanced plan may have; 0: none.

    Args:
        costs: of all ranks.
        ids: lookups by which a rank may pass the mean: those of one table.
    """
    held = [cost.bytes_held for cost in costs]
    lookups = [cost.lookups for cost in costs]
    mean_held, mean_lookups = sum(held) / len(held), sum(lookups) / len(lookups)
    most_held = max(MOST_BYTES * mean_held, mean_held + UNNOTICED_BYTES)
    too_many = max(lookups) - (mean_lookups + ids)
    return (
        max(max(held) - most_held, 0) / max(mean_held, 1)
        + (too_many / mean_lookups if too_many > 1e-9 else 0)
    )  # fmt: skip
