"""Which rank holds which rows of which table: pure data, made without a process or a device."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# How the vectors of a table's matrices become the table's vector:
#   plain    there is one matrix, whose vectors are the table's own
#   project  the vectors of the first matrix are multiplied with the second one
#   mult, add, concat  the vectors of two matrices are multiplied, added or put side by side
Join = Literal["plain", "project", "mult", "add", "concat"]

EVERY_RANK = -1


@dataclass(frozen=True)
class Matrix:
    """A parameter of a table: vectors that are looked up by id, or what projects them.

    Id i of the table is looked up in row (i // divisor) % modulus.

    Attributes:
        table: number of the table that it belongs to.
        key: its name in the state dict of all tables (`3.weight`).
        num_rows: its rows.
        dim: numbers in a row.
        bound: initial values are uniform(-bound, bound).
        divisor: ids that share a row, one after the other; 1: each has its own.
        modulus: ids this far apart share a row; 0: no two do.
        is_looked_up: its rows are looked up by id; else it is the matrix of a projection.
    """

    table: int
    key: str
    num_rows: int
    dim: int
    bound: float
    divisor: int = 1
    modulus: int = 0
    is_looked_up: bool = True


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that one rank holds, or all of its rows, which every rank holds.

    Attributes:
        matrix: the matrix.
        begin: the first of the rows.
        end: the row after the last one.
        rank: the rank that holds them; EVERY_RANK: all do, and sum the rows' gradients.
    """

    matrix: Matrix
    begin: int
    end: int
    rank: int

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.end - self.begin

    @property
    def num_values(self) -> int:
        """Numbers in the rows."""
        return self.num_rows * self.matrix.dim

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the matrix."""
        return self.num_rows == self.matrix.num_rows

    @property
    def is_shared(self) -> bool:
        """Whether every rank holds these rows."""
        return self.rank == EVERY_RANK

    def is_on(self, rank: int) -> bool:
        """Whether that rank holds these rows."""
        return self.rank in (rank, EVERY_RANK)


@dataclass(frozen=True, repr=False)
class LogicalTable:
    """A table as the model sees it: ids below num_rows go in, vectors of D numbers come out.

    Attributes:
        num_rows: ids that it has a vector for.
        dim: D.
        matrices: what it consists of, in the order in which initial values are drawn. A plain
            table is one matrix.
        join: how the matrices' vectors become the table's.
    """

    num_rows: int
    dim: int
    matrices: tuple[Matrix, ...]
    join: Join = "plain"

    def __repr__(self) -> str:
        """A few words, as --debug-mode prints all tables."""
        sizes = ", ".join(f"{one.key} {one.num_rows} x {one.dim}" for one in self.matrices)
        return f"<table of {self.num_rows} rows, {self.join}: {sizes}>"

    @property
    def num_values(self) -> int:
        """Numbers in all matrices."""
        return sum(matrix.num_rows * matrix.dim for matrix in self.matrices)

    @property
    def structure(self) -> tuple[Join, int]:
        """The vectors of tables of the same structure are joined together."""
        return self.join, self.matrices[0].dim


@dataclass(frozen=True)
class Placement:
    """Where the rows of all matrices are.

    Attributes:
        parts: those of each matrix in the order of their rows, the matrices in that of the tables.
            A rank has one part of a matrix at most. If it is alone, no part is on EVERY_RANK.
        world_size: number of ranks.
    """

    parts: tuple[Part, ...]
    world_size: int

    @classmethod
    def of_whole(cls, ranks: Iterable[tuple[Matrix, int]], world_size: int) -> "Placement":
        """Every matrix as one part.

        Args:
            ranks: (matrix, its rank or EVERY_RANK), in the order of the tables.
            world_size: number of ranks.
        """
        parts = tuple(Part(matrix, 0, matrix.num_rows, rank) for matrix, rank in ranks)
        return cls(parts, world_size)

    def parts_of(self, matrix: Matrix) -> tuple[Part, ...]:
        """The parts of a matrix, in the order of their rows."""
        return self._by_matrix.get(matrix, ())

    @functools.cached_property
    def _by_matrix(self) -> dict[Matrix, tuple[Part, ...]]:
        found: dict[Matrix, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.matrix, []).append(part)
        return {matrix: tuple(parts) for matrix, parts in found.items()}

    @property
    def is_cut(self) -> bool:
        """Whether a matrix is cut by rows."""
        return any(not part.is_whole for part in self.parts)


def place_tables(tables: Iterable[LogicalTable], world_size: int) -> Placement:
    """Spread whole tables over ranks: largest first, to the rank with the fewest, then memory.

    Every table costs one lookup for each row of a batch, so equal numbers of tables come before
    equal memory. Projections are dense parameters, and every rank has them.

    Args:
        tables: all tables.
        world_size: number of ranks.
    """
    tables = list(tables)
    tables_on, values_on = [0] * world_size, [0] * world_size
    rank_of = [0] * len(tables)
    for k in sorted(range(len(tables)), key=lambda k: -tables[k].num_values):
        rank = min(range(world_size), key=lambda rank: (tables_on[rank], values_on[rank]))
        tables_on[rank] += 1
        values_on[rank] += tables[k].num_values
        rank_of[k] = rank
    return Placement.of_whole(
        (
            (matrix, rank if matrix.is_looked_up or world_size == 1 else EVERY_RANK)
            for table, rank in zip(tables, rank_of, strict=True)
            for matrix in table.matrices
        ),
        world_size,
    )
