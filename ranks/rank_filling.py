"""Matrices are put on ranks so that all hold about equally much: whole ones, or with cuts."""

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import accumulate

from common.shares import split_evenly
from ranks.placement import Matrix


@dataclass(frozen=True)
class Load:
    """Rows of a matrix that no rank has yet.

    Attributes:
        matrix: the matrix.
        num_rows: how many of its last rows.
        row_bytes: bytes that each takes.
        ids: ids that are looked up in the matrix for each row of a batch.
    """

    matrix: Matrix
    num_rows: int
    row_bytes: int
    ids: float

    @property
    def num_bytes(self) -> int:
        """Bytes of these rows."""
        return self.num_rows * self.row_bytes

    @property
    def order(self) -> tuple[int, str]:
        """The smallest load first; of equal ones the first name, so that plans do not differ."""
        return self.num_bytes, self.matrix.key


@dataclass(frozen=True)
class Rule:
    """How ranks are filled.

    Attributes:
        tolerance: share of a rank's bytes by which it may stay too empty, or become too full, where
            that saves a cut.
        more: lookups that a rank aims at beyond the mean of what is left, or below it.
        is_routed: a rank with some rows of a matrix has that share of its lookups, else all.
    """

    tolerance: float
    more: float
    is_routed: bool


@dataclass(frozen=True)
class _Choice:
    """What a rank takes: so many of the smallest and largest loads, and rows of the next largest.

    Attributes:
        smallest: number of smallest loads.
        largest: number of largest loads.
        slice_rows: rows of the largest load but these; 0: none.
        lookups: for each row of a batch.
    """

    smallest: int
    largest: int
    slice_rows: int
    lookups: float


def whole_ranks(loads: Sequence[Load], world_size: int) -> list[int]:
    """The rank of each load, if each is to be on one.

    The largest load goes first, to the emptiest of the ranks that look up at most a load more than
    the mean.

    Args:
        loads: whole matrices.
        world_size: number of ranks.
    """
    most = sum(load.ids for load in loads) / world_size + max(load.ids for load in loads)
    held, lookups, rank_of = [0] * world_size, [0.0] * world_size, [0] * len(loads)
    for k in sorted(range(len(loads)), key=lambda k: (-loads[k].num_bytes, k)):
        ids = loads[k].ids
        keys = ((total + ids > most, size) for total, size in zip(lookups, held, strict=True))
        _, rank = min((key, rank) for rank, key in enumerate(keys))
        rank_of[k] = rank
        held[rank] += loads[k].num_bytes
        lookups[rank] += ids
    return rank_of


def one_part_each(loads: Sequence[Load], world_size: int) -> list[tuple[Matrix, int, int]]:
    """Cut loads into as many parts as there are ranks, so that the largest part is small.

    A rank with one part sends the fewest bytes; the loads are not quite even.

    Args:
        loads: whole matrices, at most as many as there are ranks.
        world_size: number of ranks.

    Returns:
        (matrix, rank, rows); the rows of a matrix follow one another in the order of the ranks.
    """
    largest = [(-load.num_bytes, k, 1) for k, load in enumerate(loads)]  # of parts; their number
    heapify(largest)
    for _ in range(world_size - len(loads)):
        _, k, count = largest[0]
        heapreplace(largest, (-loads[k].num_bytes / (count + 1), k, count + 1))
    parts = [
        (loads[k].matrix, num_rows)
        for _, k, count in sorted(largest, key=lambda one: one[1])
        for num_rows in split_evenly(loads[k].num_rows, count)
    ]
    return [(matrix, rank, num_rows) for rank, (matrix, num_rows) in enumerate(parts) if num_rows]


def cut_rows(loads: Sequence[Load], world_size: int, rule: Rule) -> list[tuple[Matrix, int, int]]:
    """Fill rank after rank, with at most one cut each, as Vose's alias method fills its bins.

    A rank's bytes are what is left over the ranks that are left. It takes a few of the smallest
    loads and is topped up with the largest ones, the last of which is cut; how many of the smallest
    decides how many lookups the rank has.

    Args:
        loads: whole matrices.
        world_size: number of ranks.
        rule: how.

    Returns:
        (matrix, rank, rows); the rows of a matrix follow one another in the order of the ranks.
    """
    left = sorted(loads, key=lambda load: load.order)
    taken = []
    for rank in range(world_size):
        if not left:
            break
        room = sum(load.num_bytes for load in left) / (world_size - rank)
        choice = _choose(left, room, world_size - rank, rule)
        end = len(left) - choice.largest
        own, left = left[: choice.smallest] + left[end:], left[choice.smallest : end]
        if choice.slice_rows:
            load = left.pop()
            rest = load.num_rows - choice.slice_rows
            own.append(replace(load, num_rows=choice.slice_rows))
            load = replace(load, num_rows=rest)
            if load.num_bytes > room:  # its next rows go to the next rank
                left.append(load)
            else:
                insort(left, load, key=lambda load: load.order)
        taken += [(load.matrix, rank, load.num_rows) for load in own]
    return taken


def _choose(left: Sequence[Load], room: float, ranks_left: int, rule: Rule) -> _Choice:
    """What a rank with room for so many bytes takes: its lookups come closest to the mean."""
    if ranks_left == 1:
        return _Choice(len(left), 0, 0, 0)
    sums = _Sums(left, rule)
    target = sums.mean_lookups(ranks_left) + rule.more
    best = sums.choice(0, room)
    for smallest in range(1, len(left) + 1):
        if sums.held[smallest] > room * (1 + rule.tolerance):
            break
        choice = sums.choice(smallest, room)
        if abs(choice.lookups - target) < abs(best.lookups - target):
            best = choice
        if choice.lookups > target + left[smallest - 1].ids:
            break
    return best


class _Sums:
    """Sums over the first loads and over the last ones, the smallest of which is the first.

    Args:
        left: loads, in their order.
        rule: how ranks are filled.

    Attributes:
        held: bytes of the first k loads, for k = 0, 1, ...
    """

    def __init__(self, left: Sequence[Load], rule: Rule) -> None:
        self._left, self._rule = left, rule
        sizes = [load.num_bytes for load in left]
        lookups = [self._lookups(load, load.num_rows) for load in left]
        self.held = list(accumulate(sizes, initial=0))
        self._lookups_first = list(accumulate(lookups, initial=0.0))
        self._held_last = list(accumulate(reversed(sizes), initial=0))
        self._lookups_last = list(accumulate(reversed(lookups), initial=0.0))

    def _lookups(self, load: Load, num_rows: int) -> float:
        return load.ids * num_rows / load.matrix.num_rows if self._rule.is_routed else load.ids

    def mean_lookups(self, ranks_left: int) -> float:
        """Lookups of each rank, if each but the last one cuts a load, which is likely a large one.

        A cut adds the lookups of a load, unless ids are routed.
        """
        lookups = self._lookups_first[-1]
        if not self._rule.is_routed:
            weighted = sum(load.num_bytes * load.ids for load in self._left)
            lookups += (ranks_left - 1) * weighted / self.held[-1]
        return lookups / ranks_left

    def choice(self, smallest: int, room: float) -> _Choice:
        """What a rank takes beside so many of the smallest loads, if it has room for bytes."""
        slack = room * self._rule.tolerance
        rest = room - self.held[smallest]
        others = len(self._left) - smallest
        largest = bisect_right(self._held_last, rest + slack, hi=others + 1) - 1
        largest = max(largest, 0)
        rest -= self._held_last[largest]
        lookups = self._lookups_first[smallest] + self._lookups_last[largest]
        slice_rows = 0
        if rest > slack and largest < others:
            load = self._left[-1 - largest]
            slice_rows = min(round(rest / load.row_bytes), load.num_rows - 1)
            lookups += self._lookups(load, slice_rows) if slice_rows else 0
        return _Choice(smallest, largest, slice_rows, lookups)
