"""Tables of the same structure, whose matrices are looked up and joined together."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Place:
    """Where the vectors of a list of matrices are found.

    Attributes:
        group: number of the group that they are looked up in.
        columns: theirs among the group's vectors, as (n,) if they do not lie side by side.
    """

    group: int
    columns: torch.Tensor | slice

    def vectors(self, of_groups: Sequence[torch.Tensor]) -> torch.Tensor:
        """The vectors (b, n, d) out of those of all groups (b, matrices, d)."""
        vectors = of_groups[self.group]
        if isinstance(self.columns, slice):
            return vectors[:, self.columns]
        return vectors.index_select(1, self.columns)


class TableVectors:
    """Makes the vectors of all tables out of those of their matrices.

    Args:
        tables: all T tables.
        columns: the matrices of each lookup group, in the order of the group's vectors.
        placement: which ranks hold the tables' rows.
        device: where the vectors are.
        optimizer: sgd, adagrad or rwsadagrad; it trains projections.
        execution: how the device is used.

    Attributes:
        projections: those of all tables that have some.
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        columns: Sequence[Sequence[Matrix]],
        placement: Placement,
        device: torch.device,
        optimizer: str,
        execution: Execution,
    ) -> None:
        structures = dict.fromkeys(table.structure for table in tables)
        alike = [[one for one in tables if one.structure == structure] for structure in structures]
        self._groups = [
            TableGroup(of_group, placement, device, optimizer, execution) for of_group in alike
        ]
        found = [group.projections for group in self._groups]
        self.projections = [one for one in found if one is not None]
        self._places = [
            [_find_place(matrices, columns, device) for matrices in group.looked_up]
            for group in self._groups
        ]
        joined = [table for of_group in alike for table in of_group]
        positions = [joined.index(table) for table in tables]
        is_in_order = positions == list(range(len(tables)))
        self._order = None if is_in_order else torch.tensor(positions, device=device)

    def join(self, of_groups: Sequence[torch.Tensor], update: Update | None) -> torch.Tensor:
        """Vectors of matrices (b, matrices, d) for each lookup group -> of tables (b, T, D).

        Args:
            of_groups: in the order of `columns`.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        joined = [
            group.join([place.vectors(of_groups) for place in places], update)
            for group, places in zip(self._groups, self._places, strict=True)
        ]
        vectors = joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)
        return vectors if self._order is None else vectors.index_select(1, self._order)


def _find_place(
    matrices: Sequence[Matrix], columns: Sequence[Sequence[Matrix]], device: torch.device
) -> _Place:
    """Where the vectors of matrices of one dimension are."""
    (number,) = (k for k, of_group in enumerate(columns) if matrices[0] in of_group)
    places = [columns[number].index(matrix) for matrix in matrices]
    first = places[0]
    if places == list(range(first, first + len(places))):
        return _Place(number, slice(first, first + len(places)))
    return _Place(number, torch.tensor(places, device=device))
