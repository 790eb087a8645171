"""Which rank holds which rows of which table: pure data, made without a process or a device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# How the vectors of a table's parts become the table's vector:
#   plain    there is one part, whose vectors are the table's own
#   project  the second part is a matrix that the first one's vectors are multiplied with
#   mult, add, concat  the vectors of two parts are multiplied, added or put side by side
Join = Literal["plain", "project", "mult", "add", "concat"]


@dataclass(frozen=True)
class Part:
    """A matrix of embedding vectors that one rank holds: all of a table, or some of it.

    Id i of the table is looked up in row (i // divisor) % modulus - begin.

    Attributes:
        table: number of the table that it belongs to.
        key: the matrix's name in the state dict of all tables (`3.weight`).
        begin: first row of the whole matrix that it holds.
        end: the row after the last one that it holds.
        dim: numbers in a row.
        bound: initial values are uniform(-bound, bound).
        divisor: ids that share a row, one after the other; 1: each has its own.
        modulus: ids this far apart share a row; 0: no two do.
        is_looked_up: its rows are looked up by id; else it is the matrix of a projection.
        rank: the rank that holds it.
    """

    table: int
    key: str
    begin: int
    end: int
    dim: int
    bound: float
    divisor: int = 1
    modulus: int = 0
    is_looked_up: bool = True
    rank: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the matrix."""
        return self.end - self.begin


@dataclass(frozen=True, repr=False)
class LogicalTable:
    """A table as the model sees it: ids below num_rows go in, vectors of D numbers come out.

    Attributes:
        num_rows: ids that it has a vector for.
        dim: D.
        parts: the matrices that it consists of, in the order in which initial values are drawn. A
            plain table is one part.
        join: how the parts' vectors become the table's.
    """

    num_rows: int
    dim: int
    parts: tuple[Part, ...]
    join: Join = "plain"

    def __repr__(self) -> str:
        """A few words, as --debug-mode prints all tables."""
        parts = ", ".join(f"{part.key} {part.num_rows} x {part.dim}" for part in self.parts)
        return f"<table of {self.num_rows} rows, {self.join}: {parts}>"

    @property
    def rank(self) -> int:
        """The rank that holds all parts."""
        return self.parts[0].rank

    @property
    def num_values(self) -> int:
        """Numbers in all parts."""
        return sum(part.num_rows * part.dim for part in self.parts)

    @property
    def structure(self) -> tuple[Join, int]:
        """Tables of the same structure are looked up and joined together."""
        return self.join, self.parts[0].dim


def place_tables(tables: Sequence[LogicalTable], world_size: int) -> tuple[LogicalTable, ...]:
    """Spread whole tables over ranks: largest first, to the rank with the fewest, then memory.

    Every table costs one lookup for each row of a batch, so equal numbers of tables come before
    equal memory.

    Args:
        tables: all tables.
        world_size: number of ranks.

    Returns:
        The tables in their order, with the ranks of their parts.
    """
    tables_on, values_on = [0] * world_size, [0] * world_size
    rank_of = [0] * len(tables)
    for k in sorted(range(len(tables)), key=lambda k: -tables[k].num_values):
        rank = min(range(world_size), key=lambda rank: (tables_on[rank], values_on[rank]))
        tables_on[rank] += 1
        values_on[rank] += tables[k].num_values
        rank_of[k] = rank
    return tuple(
        replace(table, parts=tuple(replace(part, rank=rank) for part in table.parts))
        for table, rank in zip(tables, rank_of, strict=True)
    )
