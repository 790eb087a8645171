"""The matrices of one dimension, which are looked up together, and the ranks that have them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ranks.placement import LogicalTable, Matrix, Part, Placement


@dataclass(frozen=True)
class LookupGroup:
    """The looked-up matrices of dimension d.

    Attributes:
        dim: d.
        parts: the parts that one rank has, by rank: their vectors travel.
        shared: the parts that all ranks have.
    """

    dim: int
    parts: tuple[tuple[Part, ...], ...]
    shared: tuple[Part, ...]

    @property
    def travelling(self) -> tuple[Matrix, ...]:
        """The matrices whose vectors travel, in the order of their first parts' ranks."""
        return tuple(dict.fromkeys(part.matrix for of_rank in self.parts for part in of_rank))


def make_lookup_groups(
    tables: Sequence[LogicalTable], placement: Placement
) -> tuple[LookupGroup, ...]:
    """The groups of a model, in the order in which their dimensions come in the tables.

    In a group the matrices that are joined by one operator lie side by side.
    """
    structures = list(dict.fromkeys(table.structure for table in tables))
    matrices = {
        matrix: (structures.index(table.structure), place)
        for table in tables
        for place, matrix in enumerate(table.matrices)
        if matrix.is_looked_up
    }
    parts = sorted(
        (part for part in placement.parts if part.matrix in matrices),
        key=lambda part: matrices[part.matrix],
    )
    ranks = range(placement.world_size)

    def group(dim: int) -> LookupGroup:
        alike = [part for part in parts if part.matrix.dim == dim]
        by_rank = tuple(tuple(part for part in alike if part.rank == rank) for rank in ranks)
        return LookupGroup(dim, by_rank, tuple(part for part in alike if part.is_shared))

    return tuple(group(dim) for dim in dict.fromkeys(matrix.dim for matrix in matrices))
