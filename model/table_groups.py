"""Tables of the same structure, whose matrices are looked up and joined together."""

from collections.abc import Sequence

import torch

from devices.execution import Execution
from model.projections import Projections
from optim.update import Update
from ranks.placement import LogicalTable, Matrix, Placement


class TableGroup:
    """The n tables of one structure: one operator joins the vectors of all of them.

    Args:
        tables: the tables, in the order of the vectors that are joined.
        placement: which ranks hold their rows.
        device: where they are.
        optimizer: sgd, adagrad or rwsadagrad; it trains projections too.
        execution: how the device is used.

    Attributes:
        tables: as given.
        looked_up: the matrices that are looked up: first the first one of each table, then, if
            tables have two of them, the second one of each.
        projections: the tables' projections; None if they have none.
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        placement: Placement,
        device: torch.device,
        optimizer: str,
        execution: Execution,
    ) -> None:
        self.tables, self._join = list(tables), tables[0].join
        self.looked_up: list[list[Matrix]] = []
        self.projections: Projections | None = None
        for matrices in zip(*(table.matrices for table in tables), strict=True):
            if matrices[0].is_looked_up:
                self.looked_up.append(list(matrices))
            else:
                parts = [part for one in matrices for part in placement.parts_of(one)]
                self.projections = Projections(parts, device, optimizer, execution)

    def join(self, pooled: Sequence[torch.Tensor], update: Update | None) -> torch.Tensor:
        """Pooled vectors of the matrices -> the tables' vectors (b, n, D).

        Args:
            pooled: for each list of `looked_up`, (b, n, d).
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
