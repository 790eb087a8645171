"""Which rank holds which rows of which table: pure data, made without a process or a device."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A matrix of embedding vectors that one rank holds: all of a table, or some of it.

    Attributes:
        table: number of the table that it belongs to.
        key: the matrix's name in the state dict of all tables (`3.weight`).
        begin: first row of the table that it holds: id i is its row i - begin.
        end: the row after the last one that it holds.
        dim: D, numbers in a row.
        rank: the rank that holds it.
    """

    table: int
    key: str
    begin: int
    end: int
    dim: int
    rank: int

    @property
    def num_rows(self) -> int:
        """Rows of the matrix."""
        return self.end - self.begin


@dataclass(frozen=True)
class LogicalTable:
    """A table as the model sees it: ids below num_rows go in, vectors come out.

    Attributes:
        num_rows: ids that it has a vector for.
        parts: the matrices that it consists of. A plain table is one part, whose vectors are its
            own.
    """

    num_rows: int
    parts: tuple[Part, ...]


def place_tables(num_rows: Sequence[int], dim: int, world_size: int) -> tuple[LogicalTable, ...]:
    """Spread whole tables over ranks: largest first, to the rank with the fewest tables, then rows.

    Every table costs one lookup for each row of a batch, so equal numbers of tables come before
    equal memory.

    Args:
        num_rows: rows of each table.
        dim: embedding dimension D of all tables.
        world_size: number of ranks.

    Returns:
        The tables in their order, each of one part.
    """
    tables_on, rows_on = [0] * world_size, [0] * world_size
    rank_of = [0] * len(num_rows)
    for table in sorted(range(len(num_rows)), key=lambda table: -num_rows[table]):
        rank = min(range(world_size), key=lambda rank: (tables_on[rank], rows_on[rank]))
        tables_on[rank] += 1
        rows_on[rank] += num_rows[table]
        rank_of[table] = rank
    return tuple(
        LogicalTable(rows, (Part(table, f"{table}.weight", 0, rows, dim, rank_of[table]),))
        for table, rows in enumerate(num_rows)
    )
