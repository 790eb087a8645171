"""Tables of the same structure, whose parts are looked up and whose vectors are joined together."""

from collections.abc import Sequence

import torch

from devices.execution import Execution
from model.projections import Projections
from optim.update import Update
from ranks.placement import LogicalTable, Part


class TableGroup:
    """The n tables of one structure that this rank holds: one operator joins all of them.

    Args:
        tables: the tables, in the order of the vectors that are joined.
        device: where they are.
        optimizer: sgd, adagrad or rwsadagrad; it trains projections too.
        execution: how the device is used.

    Attributes:
        tables: as given.
        looked_up: the parts that are looked up: first the first part of each table, then, if tables
            have two of them, the second part of each.
        projections: the tables' projections; None if they have none.
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        device: torch.device,
        optimizer: str,
        execution: Execution,
    ) -> None:
        self.tables, self._join = list(tables), tables[0].join
        by_place = list(zip(*(table.parts for table in tables), strict=True))
        self.looked_up: list[list[Part]] = []
        self.projections: Projections | None = None
        for parts in by_place:
            if parts[0].is_looked_up:
                self.looked_up.append(list(parts))
            else:
                self.projections = Projections(parts, device, optimizer, execution)

    def join(self, pooled: Sequence[torch.Tensor], update: Update | None) -> torch.Tensor:
        """Pooled vectors of the parts -> the tables' vectors (B, n, D).

        Args:
            pooled: for each list of `looked_up`, (B, n, d).
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        first, *others = pooled
        if self._join == "mult":
            return first * others[0]
        if self._join == "add":
            return first + others[0]
        if self._join == "concat":
            return torch.cat([first, *others], dim=2)
        return first if self.projections is None else self.projections.project(first, update)
