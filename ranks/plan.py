"""A plan of where tables are: whether it fits, and how many ranks would do if it does not."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from ranks.placement import LogicalTable, Placement
from ranks.plan_costs import RankCost, Workload, fullest_rank, rank_costs
from ranks.planner import Sharding, most_held, plan_tables

MOST_RANKS = 512  # a search for a number of ranks ends here
MOST_PLANNED = 4096  # ranks of a plan that is asked for; one of more takes minutes


@dataclass(frozen=True)
class Plan:
    """A placement and what it was planned for.

    Attributes:
        tables: all tables.
        sharding: how they are spread.
        placement: of their matrices.
        workload: of a step.
        card_bytes: bytes that tables may take on a rank; None: not said.
    """

    tables: Sequence[LogicalTable]
    sharding: Sharding
    placement: Placement
    workload: Workload
    card_bytes: float | None = None

    @classmethod
    def make(
        cls,
        tables: Sequence[LogicalTable],
        world_size: int,
        sharding: Sharding,
        workload: Workload,
        card_bytes: float | None = None,
    ) -> "Plan":
        """Plan where the rows of all tables are to be, as `plan_tables` does."""
        placement = plan_tables(tables, world_size, sharding, workload, card_bytes)
        return cls(tables, sharding, placement, workload, card_bytes)

    @functools.cached_property
    def costs(self) -> tuple[RankCost, ...]:
        """What it costs each rank."""
        return rank_costs(self.placement, self.workload)

    @property
    def fits(self) -> bool:
        """Whether no rank needs more than `card_bytes`."""
        return self.card_bytes is None or fullest_rank(self.costs)[1].bytes_held <= self.card_bytes

    def what_would_do(self, card_bytes: float) -> str:
        """A few words on how many ranks would do, or would with tables that are cut if none does.

        Args:
            card_bytes: bytes that tables may take on a rank.
        """
        tables, sharding, workload = self.tables, self.sharding, self.workload
        enough = fewest_ranks(tables, sharding, workload, card_bytes)
        if enough:
            return f"{_ranks(enough)} would do"
        none = f"no number of ranks up to {MOST_RANKS} would do"
        if sharding != "auto":
            enough = fewest_ranks(tables, "auto", workload, card_bytes)
        return f"{none}; with --sharding=auto {_ranks(enough)} would" if enough else none

    def check(self) -> None:
        """Raise a UserError if the fullest rank needs more than `card_bytes`."""
        if self.card_bytes is None or self.fits:
            return
        fullest, cost = fullest_rank(self.costs)
        raise UserError(
            f"tables need {cost.bytes_held / 1e9:.4g} GB on rank {fullest},"
            f" --card-memory={self.card_bytes / 1e9:g} GB: {self.what_would_do(self.card_bytes)}"
        )


def fewest_ranks(
    tables: Sequence[LogicalTable], sharding: Sharding, workload: Workload, card_bytes: float
) -> int | None:
    """With how few ranks no rank needs more than `card_bytes`; None: with none up to MOST_RANKS.

    Numbers are tried by planning, from the least one that could do: in steps that double until one
    does, then by halving what is between it and the last that did not.

    Args:
        tables: all tables.
        sharding: how tables are spread.
        workload: of a step; its rows are those of all ranks, however many there are.
        card_bytes: bytes that tables may take on a rank.
    """

    def held(num_ranks: int, way: Sharding) -> int:
        return most_held(plan_tables(tables, num_ranks, way, workload, card_bytes), workload)

    def fits(num_ranks: int) -> bool:
        # equal shares, which `auto` takes too if nothing else fits, are planned at once
        ways: tuple[Sharding, ...] = ("row", sharding) if sharding == "auto" else (sharding,)
        return any(held(num_ranks, way) <= card_bytes for way in ways)

    least = max(math.ceil(held(1, sharding) / card_bytes), 1)
    if least > MOST_RANKS:
        return None
    too_few, enough = least - 1, least
    while not fits(enough):
        if enough == MOST_RANKS:
            return None
        too_few, enough = enough, min(2 * enough - least + 2, MOST_RANKS)
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
