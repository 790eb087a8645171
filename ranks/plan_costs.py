"""What a placement costs each rank: bytes held, lookups, bytes sent in a step.

W ranks share a global batch of B rows, of which rank r has b_r. The four kinds of bytes that a
rank sends in a training step are explained at the functions that compute them.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.shares import split_evenly
from ranks.placement import Matrix, Part, Placement

FLOAT_BYTES = 4  # of a number that is held, or summed over ranks
ID_BYTES = 4  # ids travel as int32


def no_state(matrix: Matrix) -> int:
    """The optimiser's numbers for a row if it keeps none, as sgd."""
    return 0


@dataclass(frozen=True)
class Workload:
    """What a training step asks of the tables.

    Attributes:
        rows: B, rows of the global batch.
        ids_per_bag: mean number of ids in a bag, of each table or of all.
        wire_bytes: bytes of a number of a vector, or of its gradient, on its way between ranks.
        is_routed: an id of a cut matrix goes to the rank that has its row alone, because shapes may
            depend on ids, and ids are spread evenly over rows; else it goes to all ranks that have
            a part, each of which returns a partial sum.
        state_numbers: numbers that the optimiser keeps for a row of a matrix.
        pooling_numbers: numbers of learned pooling for a row: its weight and this one's state.
        num_dense: parameters of the MLPs.
        has_lengths: the number of ids in each bag is sent, too.
    """

    rows: int
    ids_per_bag: float | tuple[float, ...] = 1
    wire_bytes: int = 4
    is_routed: bool = False
    state_numbers: Callable[[Matrix], int] = no_state
    pooling_numbers: int = 0
    num_dense: int = 0
    has_lengths: bool = False

    def ids_of(self, matrix: Matrix) -> float:
        """Ids of a bag that are looked up in the matrix; 0 for a projection."""
        if not matrix.is_looked_up:
            return 0
        if isinstance(self.ids_per_bag, tuple):
            return self.ids_per_bag[matrix.table]
        return self.ids_per_bag

    def row_bytes(self, matrix: Matrix) -> int:
        """Bytes that a row takes: its vector, the optimiser's state, learned pooling."""
        pooling = self.pooling_numbers if matrix.is_looked_up else 0
        return (matrix.dim + self.state_numbers(matrix) + pooling) * FLOAT_BYTES

    def gradient_numbers(self, matrix: Matrix) -> int:
        """Numbers in the gradient of a row: its vector's, and that of its pooling weight."""
        return matrix.dim + (self.pooling_numbers > 0 and matrix.is_looked_up)


@dataclass(frozen=True)
class RankCost:
    """What a placement costs one rank.

    Attributes:
        num_whole: parts that are whole matrices.
        num_cut: parts with some of a matrix's rows.
        num_shared: parts that every rank holds.
        bytes_held: rows with their state, and the dense gradients of shared ones.
        lookups: rows looked up for each row of the global batch.
        ids_sent: bytes of ids, and of lengths of bags, sent in a step.
        vectors_sent: bytes of pooled vectors, or partial sums of them.
        gradients_sent: bytes of these vectors' gradients.
        dense_sent: bytes of the sum of dense gradients over ranks.
    """

    num_whole: int
    num_cut: int
    num_shared: int
    bytes_held: int
    lookups: float
    ids_sent: float
    vectors_sent: float
    gradients_sent: float
    dense_sent: float

    @property
    def num_parts(self) -> int:
        """All parts on the rank."""
        return self.num_whole + self.num_cut + self.num_shared

    @property
    def bytes_sent(self) -> float:
        """All bytes that it sends in a step."""
        return self.ids_sent + self.vectors_sent + self.gradients_sent + self.dense_sent


def part_bytes(part: Part, workload: Workload) -> int:
    """Bytes that a part takes on its rank.

    A shared part has a dense gradient of all its rows beside them.
    """
    row = workload.row_bytes(part.matrix)
    if part.is_shared:
        row += workload.gradient_numbers(part.matrix) * FLOAT_BYTES
    return part.num_rows * row


def rank_costs(placement: Placement, workload: Workload) -> tuple[RankCost, ...]:
    """What a placement costs each rank, in the order of the ranks."""
    world_size = placement.world_size
    on_rank: list[list[Part]] = [[] for _ in range(world_size)]
    shared: list[Part] = []
    for part in placement.parts:
        (shared if part.is_shared else on_rank[part.rank]).append(part)
    shared_bytes = sum(part_bytes(part, workload) for part in shared)
    shared_lookups = sum(workload.ids_of(part.matrix) for part in shared) / world_size
    sent = zip(*_exchanged(on_rank, workload), strict=True)
    dense = _dense_sum(shared, world_size, workload)
    return tuple(
        RankCost(
            num_whole=sum(part.is_whole for part in parts),
            num_cut=sum(not part.is_whole for part in parts),
            num_shared=len(shared),
            bytes_held=shared_bytes + sum(part_bytes(part, workload) for part in parts),
            lookups=shared_lookups + sum(_ids_in(part, workload) for part in parts),
            ids_sent=ids,
            vectors_sent=vectors,
            gradients_sent=gradients,
            dense_sent=dense,
        )
        for parts, (ids, vectors, gradients) in zip(on_rank, sent, strict=True)
    )


def fullest_rank(costs: Sequence[RankCost]) -> tuple[int, RankCost]:
    """The rank that holds the most bytes, the first of equal ones, and its costs."""
    return max(enumerate(costs), key=lambda one: (one[1].bytes_held, -one[0]))


def _exchanged(
    on_rank: Sequence[Sequence[Part]], workload: Workload
) -> tuple[list[float], list[float], list[float]]:
    """Bytes of ids, vectors and gradients that each rank sends in a step.

    Ids: rank r sends to each other rank s the ids of its b_r rows, once for each table that has a
    part on s, and how many each bag has if that is not always one. Vectors: r answers each s with a
    vector for each of the b_s rows and each part on r. Gradients go the opposite way: r sends to s
    one for each of its b_r rows and each part on s. Nothing is sent for a rank's own parts.

    Args:
        on_rank: the parts on each rank but the shared ones.
        workload: of the step.
    """
    rows = split_evenly(workload.rows, len(on_rank))
    ids = [_ids_for(parts, workload) for parts in on_rank]
    numbers = [
        sum(part.matrix.dim * _share_of_bags(part, workload) for part in parts) for parts in on_rank
    ]
    all_ids, all_numbers, wire = sum(ids), sum(numbers), workload.wire_bytes
    return (
        [ID_BYTES * own * (all_ids - here) for own, here in zip(rows, ids, strict=True)],
        [wire * (workload.rows - own) * here for own, here in zip(rows, numbers, strict=True)],
        [wire * own * (all_numbers - here) for own, here in zip(rows, numbers, strict=True)],
    )


def _dense_sum(shared: Sequence[Part], world_size: int, workload: Workload) -> float:
    """Bytes that a rank sends while dense gradients are summed over ranks.

    They are those of the MLPs and of all rows of shared parts. On a ring each rank sends every
    number but its own W-th of them twice: to have it summed, and to let the others know the sum.
    """
    numbers = workload.num_dense + sum(
        part.num_rows * workload.gradient_numbers(part.matrix) for part in shared
    )
    return 2 * (world_size - 1) * numbers * FLOAT_BYTES / world_size


def _share_of_ids(part: Part, workload: Workload) -> float:
    """Which share of its table's ids goes to a part: its share of the rows if ids are routed."""
    return part.num_rows / part.matrix.num_rows if workload.is_routed else 1


def _share_of_bags(part: Part, workload: Workload) -> float:
    """For which share of bags a part returns a vector: those with an id that has gone to it."""
    share = _share_of_ids(part, workload)
    return 1 if share == 1 else 1 - (1 - share) ** workload.ids_of(part.matrix)


def _ids_in(part: Part, workload: Workload) -> float:
    """Rows that are looked up in a part for each row of the global batch."""
    return workload.ids_of(part.matrix) * _share_of_ids(part, workload)


def _ids_for(parts: Sequence[Part], workload: Workload) -> float:
    """Ids, and lengths of bags, that go to a rank with these parts for each row of the batch.

    What two matrices of a table need goes there once.
    """
    # shares of a table's ids, and of its bags, that go elsewhere alone
    ids_elsewhere: defaultdict[int, float] = defaultdict(lambda: 1)
    bags_elsewhere: defaultdict[int, float] = defaultdict(lambda: 1)
    ids = {}
    for part in parts:
        table = part.matrix.table
        ids_elsewhere[table] *= 1 - _share_of_ids(part, workload)
        bags_elsewhere[table] *= 1 - _share_of_bags(part, workload)
        ids[table] = workload.ids_of(part.matrix)
    return sum(
        ids[table] * (1 - ids_elsewhere[table]) + workload.has_lengths * (1 - bags_elsewhere[table])
        for table in ids
    )
