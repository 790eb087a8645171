"""The embedding engine: all tables of a rank in one matrix, updated in the backward pass."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import RankError
from devices.execution import Execution
from devices.gpu import triton_kernels
from model.batch import Bags
from model.exchange import Exchange
from optim.row_optimizers import POOLING_OPTIMIZERS, TABLE_OPTIMIZERS, RowOptimizer
from optim.update import Update
from ranks.placement import Shard

VALUES_AT_A_TIME = 1 << 22  # initial values drawn at a time


class _Lookup(torch.autograd.Function):
    """Pooled vectors of bags; its backward hands the gradient to the tables.

    These update their rows in place, so no gradient of a table's size exists. `anchor` is
    what makes autograd come back here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tables: "EmbeddingTables",
        bags: Bags,
        update: Update | None,
    ) -> torch.Tensor:
        ctx.tables, ctx.bags, ctx.update = tables, bags, update
        return tables.pool(bags)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        assert ctx.update is not None, "a forward pass without an update has no backward pass"
        ctx.tables.take_gradient(ctx.bags, gradient, ctx.update)
        return None, None, None, None


def _zeros(rows: int, dim: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.zeros(rows, dim, device=device)
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
        raise RankError(
            f"no memory for {rows} rows of {dim} numbers ({4e-9 * rows * dim:.1f} GB of tables) on"
            f" {device}: more ranks, a lower --max-ind-range or a smaller"
            " --arch-sparse-feature-size help"
        ) from error


class EmbeddingTables(nn.Module):
    """Embedding bags of T tables, summed over each bag; this rank holds the shards that are its.

    Args:
        shards: of all tables, with the ranks that hold them.
        dim: embedding dimension D.
        exchange: moves ids to tables and vectors to rows.
        optimizer: sgd, adagrad or rwsadagrad.
        learned_pooling: each row has a weight in the sum over its bag, trained too.
        execution: how the device is used; vectors travel between ranks in its lower precision,
            as the interaction takes them, tables and updates stay float32.

    Attributes:
        weight: (rows of this rank, D), the shards one after the other, in order of their tables.
        pooling: (rows of this rank, 1) weights, or None.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        dim: int,
        exchange: Exchange,
        optimizer: str,
        learned_pooling: bool,
        execution: Execution = Execution(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        self.shards, self.dim, self.exchange = tuple(shards), dim, exchange
        self._execution = execution
        device = exchange.process.device
        self.mine = [shard for shard in shards if shard.rank == exchange.process.rank]
        sizes = [shard.end - shard.begin for shard in self.mine]
        self._begin = np.cumsum([0, *sizes])
        self.weight = _zeros(int(self._begin[-1]), dim, device)
        self.pooling = torch.ones(len(self.weight), 1, device=device) if learned_pooling else None
        self._triton = triton_kernels() if execution.triton else None
        self.optimizer = TABLE_OPTIMIZERS[optimizer](self.weight, execution.triton)
        self.pooling_optimizer = (
            None
            if self.pooling is None
            else POOLING_OPTIMIZERS[optimizer](self.pooling, execution.triton)
        )
        offsets = [
            begin - shard.begin for begin, shard in zip(self._begin, self.mine, strict=False)
        ]
        self._offsets = torch.tensor(offsets, dtype=torch.int64, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def forward(
        self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None = None
    ) -> torch.Tensor:
        """Bags of this rank's b rows -> pooled vectors (b, T, D).

        Args:
            bags: ids of this rank's rows in all tables.
            rows_per_rank: rows of the batch on each rank.
            update: what the backward pass does with the gradients; None: there is none.
        """
        bags = self._to_weight_rows(self.exchange.ids_to_tables(bags, rows_per_rank))
        pooled = _Lookup.apply(self._anchor, self, bags, update)
        if self._execution.lower is not None:
            pooled = pooled.to(self._execution.lower)
        return self.exchange.vectors_to_rows(
            pooled.view(sum(rows_per_rank), len(self.mine), self.dim), rows_per_rank
        )

    def _to_weight_rows(self, bags: Bags) -> Bags:
        """Ids within tables -> rows of the weight matrix."""
        if bags.lengths is None:
            if not self.mine:
                return Bags(bags.ids.long())
            return Bags((bags.ids.view(-1, len(self.mine)) + self._offsets).view(-1))
        offsets = self._offsets.expand_as(bags.lengths).reshape(-1)
        of_ids = torch.repeat_interleave(
            offsets, bags.lengths.reshape(-1), output_size=len(bags.ids)
        )
        return Bags(bags.ids + of_ids, bags.lengths)

    def pool(self, bags: Bags) -> torch.Tensor:
        """Sums over bags of weight rows: (bags, D)."""
        weights = None if self.pooling is None else F.embedding(bags.ids, self.pooling)
        if bags.lengths is None:
            vectors = self._look_up(bags.ids)
            return vectors if weights is None else vectors * weights
        lengths = bags.lengths.reshape(-1)
        offsets = lengths.cumsum(0) - lengths
        weights = None if weights is None else weights.view(-1)
        return F.embedding_bag(
            bags.ids, self.weight, offsets, mode="sum", per_sample_weights=weights
        )

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """(B * T,) rows of the weight matrix -> their vectors (B * T, D)."""
        if self._triton and self._execution.one_lookup:
            lower = self._execution.lower or self.weight.dtype
            vectors: torch.Tensor = self._triton.look_up(self.weight, rows, lower)
            return vectors
        if self._execution.one_lookup or not self.mine:
            return F.embedding(rows, self.weight)
        of_tables = rows.view(-1, len(self.mine)).unbind(1)
        by_table = [F.embedding(of_table, self.weight) for of_table in of_tables]
        return torch.stack(by_table, dim=1).view(-1, self.dim)

    def take_gradient(self, bags: Bags, gradient: torch.Tensor, update: Update) -> None:
        """Gradient of the pooled vectors (bags, D) -> gradients of rows, applied now or kept."""
        of_ids = gradient
        if bags.lengths is not None:
            lengths = bags.lengths.reshape(-1)
            bag_of = torch.repeat_interleave(lengths, output_size=len(bags.ids))
            of_ids = F.embedding(bag_of, gradient)
        of_pooling = None
        if self.pooling is not None:
            of_pooling = (of_ids * F.embedding(bags.ids, self.weight)).sum(1, keepdim=True)
            of_ids = of_ids * F.embedding(bags.ids, self.pooling)
        _give(self.optimizer, bags.ids, of_ids, update)
        if self.pooling_optimizer is not None and of_pooling is not None:
            _give(self.pooling_optimizer, bags.ids, of_pooling, update)

    def apply_kept(self, update: Update) -> None:
        """Update with what the loss's scale had kept, unless the step has overflowed."""
        if not update.scale.is_on:
            return
        for optimizer in (self.optimizer, self.pooling_optimizer):
            if optimizer is not None:
                optimizer.apply_kept(update.lr, update.scale)

    @torch.no_grad()
    def initialise(self, num_rows: Sequence[int]) -> None:
        """Draw uniform(+-sqrt(1/rows)) for each table in order from numpy's global generator.

        Every rank draws every table and keeps its rows, so the numbers are those of one process.
        """
        views = {
            shard.table: view
            for shard, view in zip(self.mine, self._views(self.weight), strict=True)
        }
        at_a_time = max(1, VALUES_AT_A_TIME // self.dim)
        for table, rows in enumerate(num_rows):
            bound = np.sqrt(1 / rows)
            for begin in range(0, rows, at_a_time):
                size = (min(at_a_time, rows - begin), self.dim)
                values = np.random.uniform(low=-bound, high=bound, size=size).astype(np.float32)
                if table in views:
                    views[table][begin : begin + size[0]].copy_(torch.from_numpy(values))

    def _views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a tensor of this rank's rows that belong to each of its shards."""
        return [
            whole[begin:end] for begin, end in zip(self._begin[:-1], self._begin[1:], strict=True)
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has a row for each row of this rank, by name: weight, pooling, optimiser state.

        State of the pooling weights is called `pooling.sum`, that of the tables by its own name.
        """
        found = {"weight": self.weight} | self.optimizer.state
        if self.pooling is not None and self.pooling_optimizer is not None:
            found["pooling"] = self.pooling.view(-1)
            found |= {
                f"pooling.{name}": state.view(-1)
                for name, state in self.pooling_optimizer.state.items()
            }
        return found

    def shard_views(self, name: str) -> Iterator[tuple[Shard, torch.Tensor | None]]:
        """(shard, its part of `tensors()[name]`) of all shards; None for what other ranks hold."""
        views = iter(self._views(self.tensors()[name]))
        for shard in self.shards:
            yield shard, next(views) if shard.rank == self.exchange.process.rank else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for shard, view in zip(self.mine, self._views(self.weight), strict=True):
            destination[f"{prefix}{shard.table}.weight"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for shard, view in zip(self.mine, self._views(self.weight), strict=True):
            view.copy_(state_dict[f"{prefix}{shard.table}.weight"][shard.begin : shard.end])


def _give(
    optimizer: RowOptimizer, rows: torch.Tensor, gradients: torch.Tensor, update: Update
) -> None:
    """Gradients (n, D) of rows (n,) to their optimiser, which applies or keeps them."""
    if update.scale.is_on:
        gradients = gradients.float()  # without their scale float16 would make some of them 0
        update.scale.unscale_([gradients])
        optimizer.keep(rows, gradients)
    elif update.rows_now:
        optimizer.apply(rows, gradients, update.lr)
    else:
        optimizer.keep(rows, gradients)


class PoolingWeights(nn.Module):
    """The engine's learned pooling weights under the original's names, `v_W_l.{table}`."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self._tables = [tables]  # in a list, so that it is not a submodule twice

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for shard, view in self._tables[0].shard_views("pooling"):
            if view is not None:
                destination[f"{prefix}{shard.table}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for shard, view in self._tables[0].shard_views("pooling"):
            if view is not None:
                view.copy_(state_dict[f"{prefix}{shard.table}"][shard.begin : shard.end])
