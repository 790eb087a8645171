"""Which rank holds which table."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rows [begin, end) of a table, held by a rank. A whole table is one shard."""

    table: int
    begin: int
    end: int
    rank: int


def place_tables(num_rows: Sequence[int], world_size: int) -> tuple[Shard, ...]:
    """Spread whole tables over ranks: largest first, to the rank with the fewest tables, then rows.

    Every table costs one lookup a row of the batch, so equal numbers of tables come before equal
    memory.
    """
    tables, rows = [0] * world_size, [0] * world_size
    shards = []
    for table in sorted(range(len(num_rows)), key=lambda table: -num_rows[table]):
        rank = min(range(world_size), key=lambda rank: (tables[rank], rows[rank]))
        tables[rank] += 1
        rows[rank] += num_rows[table]
        shards.append(Shard(table, 0, num_rows[table], rank))
    return tuple(sorted(shards, key=lambda shard: shard.table))
