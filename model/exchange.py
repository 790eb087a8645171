"""Sends ids to the ranks that hold the tables, and pooled vectors back."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from common.phases import phase
from model.batch import Bags, TablePick, ids_of_bags
from ranks.placement import LogicalTable
from ranks.process import Process


class AllToAll(torch.autograd.Function):
    """all_to_all_single of a flat tensor; the gradient travels the opposite way."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, send: list[int], receive: list[int], process: Process
    ) -> torch.Tensor:
        """`send[r]` numbers to each rank r -> `receive[r]` numbers from each, rank by rank."""
        ctx.sizes, ctx.process = (send, receive), process
        received = values.new_empty(sum(receive))
        with process.attendance:
            dist.all_to_all_single(received, values.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        """Gradients of what was received -> gradients of what was sent."""
        send, receive = ctx.sizes
        returned = gradient.new_empty(sum(send))
        with phase("exchange"), ctx.process.attendance:
            dist.all_to_all_single(returned, gradient.contiguous(), send, receive)
        return returned, None, None, None


class Exchange:
    """Moves ids to the ranks that hold the tables, and pooled vectors back.

    Both directions use one order of the tables: rank by rank, on a rank those of one structure
    after those of another, and otherwise as they come. The shapes of all messages follow from the
    number of rows and ids, never from the ids.

    Args:
        process: this rank.
        tables: all T tables, with the ranks that hold them; their vectors have D numbers each.

    Attributes:
        process: as given.
        tables_of: the numbers of each rank's tables.
    """

    def __init__(self, process: Process, tables: Sequence[LogicalTable]) -> None:
        self.process, self._num_tables = process, len(tables)
        in_groups = sorted(range(len(tables)), key=lambda number: tables[number].structure)
        self.tables_of = [
            [number for number in in_groups if tables[number].rank == rank]
            for rank in range(process.world_size)
        ]
        (self._dim,) = {table.dim for table in tables}
        in_order = [number for of_rank in self.tables_of for number in of_rank]
        self._order = torch.tensor(in_order, device=process.device)
        own = self.tables_of[process.rank]
        self._pick_own = TablePick(own, len(tables), process.device)

    def ids_to_tables(self, bags: Bags, rows_per_rank: Sequence[int]) -> Bags:
        """Bags of this rank's rows in all tables -> bags of all ranks' rows in this rank's tables.

        Args:
            bags: those of this rank's b rows, in the order of the tables.
            rows_per_rank: rows of the batch on each rank, B in all.

        Returns:
            Bags of B rows, ordered by rank, and of this rank's tables in the exchange's order.
        """
        rank = self.process.rank
        own_tables = self.tables_of[rank]
        if self.process.world_size == 1:
            return self._pick_own(bags)
        send = [rows_per_rank[rank] * len(tables) for tables in self.tables_of]
        receive = [rows * len(own_tables) for rows in rows_per_rank]
        if bags.lengths is None:
            ids = self._columns_by_rank(bags.ids.view(rows_per_rank[rank], self._num_tables))
            return Bags(AllToAll.apply(ids, send, receive, self.process))
        lengths = self._columns_by_rank(bags.lengths)
        received = AllToAll.apply(lengths, send, receive, self.process)
        assert bags.ids_per_rank is not None
        begins = self._columns_by_rank(bags.begins())
        send = [int(bags.ids_per_rank[rank, tables].sum()) for tables in self.tables_of]
        ids = ids_of_bags(bags.ids, begins, lengths, sum(send))
        ids_per_rank = bags.ids_per_rank[:, own_tables]
        ids = AllToAll.apply(ids, send, ids_per_rank.sum(1).tolist(), self.process)
        return Bags(ids, received.view(sum(rows_per_rank), len(own_tables)), ids_per_rank)

    def _columns_by_rank(self, columns: torch.Tensor) -> torch.Tensor:
        """(b, T) -> flat, a number for each row and table: rank by rank, on a rank row by row."""
        widths = [len(tables) for tables in self.tables_of]
        return torch.cat(
            [share.reshape(-1) for share in columns[:, self._order].split(widths, dim=1)]
        )

    def vectors_to_rows(self, vectors: torch.Tensor, rows_per_rank: Sequence[int]) -> torch.Tensor:
        """Vectors of all ranks' rows in this rank's tables -> vectors of its rows in all tables.

        Args:
            vectors: (B, t, D) for this rank's t tables.
            rows_per_rank: rows of the batch on each rank.

        Returns:
            (b, T, D), tables in the exchange's order.
        """
        if self.process.world_size == 1:
            return vectors
        num_rows = rows_per_rank[self.process.rank]
        send = [rows * vectors.shape[1] * self._dim for rows in rows_per_rank]
        counts = [len(tables) for tables in self.tables_of]
        receive = [num_rows * count * self._dim for count in counts]
        flat = AllToAll.apply(vectors.reshape(-1), send, receive, self.process)
        by_rank = zip(flat.split(receive), counts, strict=True)
        return torch.cat([part.view(num_rows, count, self._dim) for part, count in by_rank], dim=1)
