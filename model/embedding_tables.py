"""Embedding bags of all tables, whichever ranks hold them, under the original's names."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from common.phases import phase
from devices.execution import Execution
from model.batch import Bags
from model.embedding_matrix import EmbeddingMatrix
from model.exchange import Exchange
from optim.update import Update
from ranks.placement import LogicalTable, Part

VALUES_PER_DRAW = 1 << 22  # initial values drawn at a time


class EmbeddingTables(nn.Module):
    """Embedding bags of T tables, summed over each bag; this rank holds some of their parts.

    Ids travel to the ranks of the parts, the parts' pooled vectors travel back, and the vectors
    of a table's parts are joined to that of the table.

    Args:
        tables: all T tables, with the ranks that hold their parts.
        exchange: moves ids to parts and vectors to rows.
        optimizer: sgd, adagrad or rwsadagrad.
        learned_pooling: each row has a trained weight in the sum over its bag.
        execution: how the device is used; vectors travel between ranks in its lower precision,
            which is what the interaction takes. Tables and updates stay float32.

    Attributes:
        exchange: as given.
        parts: the parts of all tables, in the tables' order.
        matrix: the parts of this rank.
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        exchange: Exchange,
        optimizer: str,
        learned_pooling: bool,
        execution: Execution = Execution(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        self._tables, self.exchange, self._execution = tables, exchange, execution
        self.parts = tuple(part for table in tables for part in table.parts)
        (self._dim,) = {part.dim for part in self.parts}  # plain tables: one dimension, one matrix
        process = exchange.process
        self._own_parts = exchange.parts_of[process.rank]
        self.matrix = EmbeddingMatrix(
            self._own_parts, self._dim, process.device, optimizer, learned_pooling, execution
        )
        self._part_of_table = self._find_parts(process.device)

    def _find_parts(self, device: torch.device) -> torch.Tensor | None:
        """(T,) position of each table's part in the exchange's order; None: they are in order."""
        exchanged = [part for parts in self.exchange.parts_of for part in parts]
        positions = [exchanged.index(part) for part in self.parts]
        if positions == list(range(len(positions))):
            return None
        return torch.tensor(positions, device=device)

    def forward(
        self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None = None
    ) -> torch.Tensor:
        """Bags of this rank's b rows -> pooled vectors (b, T, D).

        Args:
            bags: ids of this rank's rows in all tables.
            rows_per_rank: rows of the batch on each rank.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        with phase("exchange"):
            bags = self.exchange.ids_to_parts(bags, rows_per_rank)
        pooled = self.matrix.look_up(bags, update)
        if self._execution.lower is not None:
            pooled = pooled.to(self._execution.lower)
        side_by_side = pooled.view(sum(rows_per_rank), len(self._own_parts) * self._dim)
        with phase("exchange"):
            vectors = self.exchange.vectors_to_rows(side_by_side, rows_per_rank)
        return self._join(vectors)

    def _join(self, vectors: torch.Tensor) -> torch.Tensor:
        """Parts' vectors side by side, in the exchange's order -> the tables' vectors (b, T, D).

        A plain table's vector is the vector of its one part.
        """
        by_part = vectors.view(len(vectors), len(self.parts), self._dim)
        if self._part_of_table is None:
            return by_part  # without a copy
        return by_part.index_select(1, self._part_of_table)

    def apply_kept(self, update: Update) -> None:
        """Apply the gradients that a scaled loss had to keep, unless the step has overflowed."""
        self.matrix.apply_kept(update)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw uniform(+-sqrt(1/rows)) for each table in order from numpy's global generator.

        Every rank draws every table and keeps its own parts, so the numbers are those of one
        process.
        """
        for table in self._tables:
            bound = np.sqrt(1 / table.num_rows)
            for part in table.parts:
                _draw_uniform(part, bound, self.matrix.part_view("weight", part))

    def row_tensors(self) -> dict[str, torch.Tensor]:
        """What EmbeddingMatrix.row_tensors returns for the parts of this rank."""
        return self.matrix.row_tensors()

    def part_views(self, name: str) -> Iterator[tuple[Part, torch.Tensor | None]]:
        """(part, its rows of `row_tensors()[name]`) of all parts; None if another rank has it."""
        for part in self.parts:
            yield part, self.matrix.part_view(name, part)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part, view in self.part_views("weight"):
            if view is not None:
                destination[f"{prefix}{part.key}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for part, view in self.part_views("weight"):
            if view is not None:
                view.copy_(state_dict[f"{prefix}{part.key}"][part.begin : part.end])


def _draw_uniform(part: Part, bound: float, view: torch.Tensor | None) -> None:
    """Draw the part's rows, some at a time, into the view; None: draw and forget them."""
    rows_per_draw = max(1, VALUES_PER_DRAW // part.dim)
    for begin in range(0, part.num_rows, rows_per_draw):
        size = (min(rows_per_draw, part.num_rows - begin), part.dim)
        values = np.random.uniform(low=-bound, high=bound, size=size)
        if view is not None:
            view[begin : begin + size[0]].copy_(torch.from_numpy(values.astype(np.float32)))


class PoolingWeights(nn.Module):
    """The learned pooling weights of the tables under the original's names, `v_W_l.{table}`."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self._tables = [tables]  # in a list, so that it is not a submodule twice

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part, view in self._tables[0].part_views("pooling"):
            if view is not None:
                destination[f"{prefix}{part.table}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for part, view in self._tables[0].part_views("pooling"):
            if view is not None:
                view.copy_(state_dict[f"{prefix}{part.table}"][part.begin : part.end])
