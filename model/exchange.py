"""What an exchange is: it sends ids to the ranks that have the rows, and pooled vectors back.

`make_exchange` of routed_exchange.py chooses one for a device and a placement.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from model.batch import Bags
from model.lookup_groups import make_lookup_groups
from model.travel import Types
from optim.update import Update
from ranks.placement import LogicalTable, Matrix, Placement
from ranks.process import Process


class Trip(Protocol):
    """The ids and vectors of one forward pass.

    Attributes:
        bags: for each group of which this rank has parts, bags of rows of its matrix.
    """

    bags: Sequence[Bags]

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        """Send vectors (bags, d) of each of `bags` on their way."""

    def arrive(self) -> list[torch.Tensor]:
        """Wait; returns (b, matrices, d) for each group, in the order of the exchange's slots."""


class Exchange:
    """Moves ids to the ranks that have the rows, and pooled vectors back; a subclass knows how.

    Args:
        process: this rank.
        tables: all T tables.
        placement: which ranks have their rows.
        types: of the vectors, and of their numbers on their way.

    Attributes:
        is_routed: ids go to the rank that has their row alone, and no other gets them.
        process, placement, types: as given.
        groups: the matrices that are looked up, by their dimension.
        slots: the matrices of each group whose vectors travel, in the order in which they arrive.
        shifts: (T,) int32 that lead from ids of the tables to rows of the only matrix, which may
            then come in the ids' place; None: there is no such matrix.
    """

    is_routed: bool
    slots: Sequence[tuple[Matrix, ...]]
    shifts: torch.Tensor | None = None

    def __init__(
        self,
        process: Process,
        tables: Sequence[LogicalTable],
        placement: Placement,
        types: Types = Types(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.process, self.placement, self.types = process, placement, types
        self.groups = make_lookup_groups(tables, placement)
        self._num_tables = len(tables)

    def begin(self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None) -> Trip:
        """Send this rank's ids to the ranks that have the rows, and receive what is asked of it.

        Args:
            bags: those of this rank's b rows, in the order of the tables.
            rows_per_rank: rows of the batch on each rank, B in all.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        raise NotImplementedError
