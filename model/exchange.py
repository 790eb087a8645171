"""Sends ids to the ranks that hold the tables' parts, and pooled vectors back."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from common.phases import phase
from model.batch import Bags
from ranks.placement import LogicalTable
from ranks.process import Process


class AllToAll(torch.autograd.Function):
    """all_to_all_single of a flat tensor; the gradient travels the opposite way."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, send: list[int], receive: list[int]
    ) -> torch.Tensor:
        """`send[r]` numbers to each rank r -> `receive[r]` numbers from each, rank by rank."""
        ctx.sizes = send, receive
        received = values.new_empty(sum(receive))
        dist.all_to_all_single(received, values.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """Gradients of what was received -> gradients of what was sent."""
        send, receive = ctx.sizes
        returned = gradient.new_empty(sum(send))
        with phase("exchange"):
            dist.all_to_all_single(returned, gradient.contiguous(), send, receive)
        return returned, None, None


class Exchange:
    """Moves ids to the ranks that hold the tables' parts, and pooled vectors back.

    Both directions use one order of the parts: rank by rank, and on a rank in the order of the
    tables. The shapes of all messages follow from the number of rows and ids, never from the ids.

    Args:
        process: this rank.
        tables: all tables, with the ranks that hold their parts.

    Attributes:
        process: as given.
        parts_of: the parts of each rank.
    """

    def __init__(self, process: Process, tables: Sequence[LogicalTable]) -> None:
        self.process, self._num_tables = process, len(tables)
        parts = [part for table in tables for part in table.parts]
        self.parts_of = [
            [part for part in parts if part.rank == rank] for rank in range(process.world_size)
        ]
        self._widths = [sum(part.dim for part in of_rank) for of_rank in self.parts_of]
        self._tables_of = [[part.table for part in of_rank] for of_rank in self.parts_of]
        table_of_part = [table for of_rank in self._tables_of for table in of_rank]
        self._table_of_part = torch.tensor(table_of_part, device=process.device)

    def ids_to_parts(self, bags: Bags, rows_per_rank: Sequence[int]) -> Bags:
        """Bags of this rank's rows in all T tables -> bags of all ranks' rows in its own P parts.

        A part receives every id of its table.

        Args:
            bags: those of this rank's b rows.
            rows_per_rank: rows of the batch on each rank, B in all.

        Returns:
            Bags of B rows and P parts, in the order of the rows' ranks.
        """
        if self.process.world_size == 1:
            return bags
        rank = self.process.rank
        own_tables = self._tables_of[rank]
        send = [rows_per_rank[rank] * len(tables) for tables in self._tables_of]
        receive = [rows * len(own_tables) for rows in rows_per_rank]
        if bags.lengths is None:
            ids = self._columns_by_rank(bags.ids.view(rows_per_rank[rank], self._num_tables))
            return Bags(AllToAll.apply(ids, send, receive))
        lengths = self._columns_by_rank(bags.lengths)
        received = AllToAll.apply(lengths, send, receive)
        assert bags.ids_per_rank is not None
        send = [int(bags.ids_per_rank[rank, tables].sum()) for tables in self._tables_of]
        receive = bags.ids_per_rank[:, own_tables].sum(1).tolist()
        ids = AllToAll.apply(self._ids_by_rank(bags, lengths, sum(send)), send, receive)
        return Bags(ids, received.view(sum(rows_per_rank), len(own_tables)))

    def _columns_by_rank(self, columns: torch.Tensor) -> torch.Tensor:
        """(b, T) -> flat, a number for each row and part: rank by rank, on a rank row by row."""
        widths = [len(tables) for tables in self._tables_of]
        return torch.cat(
            [part.reshape(-1) for part in columns[:, self._table_of_part].split(widths, dim=1)]
        )

    def _ids_by_rank(self, bags: Bags, lengths: torch.Tensor, num_ids: int) -> torch.Tensor:
        """The ids of the bags whose lengths are `lengths`, in that order.

        Args:
            bags: bags of any length.
            lengths: what `_columns_by_rank` makes of their lengths.
            num_ids: sum of the lengths, which the host must know without waiting for the device.
        """
        assert bags.lengths is not None
        ends = bags.lengths.reshape(-1).cumsum(0).view_as(bags.lengths)
        begins = self._columns_by_rank(ends - bags.lengths)
        shifts = begins - (lengths.cumsum(0) - lengths)  # from the order sent to the order at hand
        shift_of_id = torch.repeat_interleave(shifts, lengths, output_size=num_ids)
        return bags.ids[shift_of_id + torch.arange(num_ids, device=shifts.device)]

    def vectors_to_rows(self, vectors: torch.Tensor, rows_per_rank: Sequence[int]) -> torch.Tensor:
        """Vectors of all ranks' rows in this rank's parts -> vectors of its rows in all parts.

        Args:
            vectors: (B, sum of this rank's D), the vectors of its parts side by side.
            rows_per_rank: rows of the batch on each rank.

        Returns:
            (b, sum of all D), parts in the exchange's order.
        """
        if self.process.world_size == 1:
            return vectors
        num_rows = rows_per_rank[self.process.rank]
        send = [rows * vectors.shape[1] for rows in rows_per_rank]
        receive = [num_rows * width for width in self._widths]
        received = AllToAll.apply(vectors.reshape(-1), send, receive).split(receive)
        by_rank = zip(received, self._widths, strict=True)
        return torch.cat([flat.view(num_rows, width) for flat, width in by_rank], dim=1)
