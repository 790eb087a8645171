"""Ids to the ranks that hold their tables, pooled vectors back to the ranks of the rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from model.batch import Bags
from ranks.placement import Shard
from ranks.process import Process


class _AllToAll(torch.autograd.Function):
    """all_to_all_single of a flat tensor; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, send: list[int], receive: list[int]
    ) -> torch.Tensor:
        ctx.sizes = send, receive
        received = values.new_empty(sum(receive))
        dist.all_to_all_single(received, values.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        send, receive = ctx.sizes
        returned = gradient.new_empty(sum(send))
        dist.all_to_all_single(returned, gradient.contiguous(), send, receive)
        return returned, None, None


class Exchange:
    """Moves ids to the ranks that hold their tables, pooled vectors back to those of the rows."""

    def __init__(self, process: Process, shards: Sequence[Shard]) -> None:
        self.process = process
        self.tables_of = [
            [s.table for s in shards if s.rank == rank] for rank in range(process.world_size)
        ]
        by_rank = [table for tables in self.tables_of for table in tables]
        self._by_rank = torch.tensor(by_rank, device=process.device)
        self._by_table = torch.argsort(self._by_rank)
        self._rank_of = torch.tensor([shard.rank for shard in shards], device=process.device)

    @property
    def my_tables(self) -> list[int]:
        """Tables that this rank holds, ascending."""
        return self.tables_of[self.process.rank]

    def ids_to_tables(self, bags: Bags, rows_per_rank: Sequence[int]) -> Bags:
        """Bags of this rank's rows in all tables -> of all ranks' rows in this rank's tables."""
        if self.process.world_size == 1:
            return bags
        rank, width = self.process.rank, len(self.my_tables)
        send = [rows_per_rank[rank] * len(tables) for tables in self.tables_of]
        receive = [rows * width for rows in rows_per_rank]
        if bags.lengths is None:
            ids = bags.ids.view(rows_per_rank[rank], len(self._by_rank))
            return Bags(_AllToAll.apply(self._columns_by_rank(ids), send, receive))
        lengths = _AllToAll.apply(self._columns_by_rank(bags.lengths), send, receive)
        assert bags.ids_per_rank is not None
        send = [int(bags.ids_per_rank[rank, tables].sum()) for tables in self.tables_of]
        receive = bags.ids_per_rank[:, self.my_tables].sum(1).tolist()
        ids = _AllToAll.apply(self._ids_by_rank(bags), send, receive)
        return Bags(ids, lengths.view(sum(rows_per_rank), width))

    def _columns_by_rank(self, columns: torch.Tensor) -> torch.Tensor:
        """(b, T) -> flat, the columns of rank 0's tables first, each rank's row by row."""
        widths = [len(tables) for tables in self.tables_of]
        return torch.cat(
            [part.reshape(-1) for part in columns[:, self._by_rank].split(widths, dim=1)]
        )

    def _ids_by_rank(self, bags: Bags) -> torch.Tensor:
        """Ids of bags of any length, those of rank 0's tables first; the sort is stable."""
        assert bags.lengths is not None
        rank_of_bag = self._rank_of.expand_as(bags.lengths).reshape(-1)
        rank_of_id = torch.repeat_interleave(
            rank_of_bag, bags.lengths.reshape(-1), output_size=len(bags.ids)
        )
        return bags.ids[torch.argsort(rank_of_id, stable=True)]

    def vectors_to_rows(self, vectors: torch.Tensor, rows_per_rank: Sequence[int]) -> torch.Tensor:
        """(B of all ranks, T of this rank, D) -> (B of this rank, T of all ranks, D)."""
        if self.process.world_size == 1:
            return vectors
        mine, dim = rows_per_rank[self.process.rank], vectors.shape[2]
        send = [rows * vectors.shape[1] * dim for rows in rows_per_rank]
        receive = [mine * len(tables) * dim for tables in self.tables_of]
        received = _AllToAll.apply(vectors.reshape(-1), send, receive).split(receive)
        parts = [
            part.view(mine, len(tables), dim)
            for part, tables in zip(received, self.tables_of, strict=True)
        ]
        return torch.cat(parts, dim=1).index_select(1, self._by_table)
