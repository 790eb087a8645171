"""Embedding bags of all tables, whichever ranks hold them, under the original's names."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from common.phases import phase
from devices.execution import Execution
from model.batch import Bags, TablePick
from model.embedding_matrix import EmbeddingMatrix
from model.exchange import Exchange
from model.part_matrix import PartMatrix
from model.table_groups import TableGroup
from optim.row_optimizers import ELEMENT_OPTIMIZERS, TABLE_OPTIMIZERS
from optim.update import Update
from ranks.placement import LogicalTable, Part

VALUES_PER_DRAW = 1 << 22  # initial values drawn at a time


@dataclass(frozen=True)
class _Plan:
    """Which bags one lookup takes, and whose vectors it returns: those of the parts of dimension d.

    Attributes:
        pick: picks the bags of the parts' tables out of those of this rank's tables.
        pieces: (number of the group, place of the parts in their tables, number of parts), one for
            each stretch of the matrix's columns.
    """

    pick: TablePick
    pieces: tuple[tuple[int, int, int], ...]


class Lookup(Protocol):
    """What a forward pass needs of an EmbeddingMatrix.

    Attributes:
        parts: the P parts that are looked up.
        dim: d.
    """

    parts: tuple[Part, ...]
    dim: int

    def look_up(self, bags: Bags, update: Update | None) -> torch.Tensor:
        """Bags of ids, B rows of P parts -> their pooled vectors (B * P, d)."""


class EmbeddingTables(nn.Module):
    """Embedding bags of T tables, summed over each bag; this rank holds some of the tables.

    Ids travel to the ranks of the tables. There the vectors of a table's parts are summed over each
    bag and joined, and the table's vectors travel back.

    Args:
        tables: all T tables, with the ranks that hold them; their vectors have D numbers each.
        exchange: moves ids to tables and vectors to rows.
        optimizer: sgd, adagrad or rwsadagrad.
        learned_pooling: each row has a trained weight in the sum over its bag; for plain tables.
        execution: how the device is used; vectors travel between ranks in its lower precision,
            which is what the interaction takes. Tables and updates stay float32.

    Attributes:
        exchange: as given.
        learned_pooling: as given.
        parts: the parts of all tables, in the tables' order.
        joins: how each table's parts are joined.
        matrices: the parts of this rank that are looked up, one matrix for each dimension.
        lookups: the matrices, or twins that have replaced them.
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
        self.exchange, self._execution = exchange, execution
        self.learned_pooling, self._optimizer = learned_pooling, optimizer
        self.parts = tuple(part for table in tables for part in table.parts)
        self.joins = tuple(table.join for table in tables)
        self._dim = tables[0].dim
        self._device = device = exchange.process.device
        own = [tables[number] for number in exchange.tables_of[exchange.process.rank]]
        self._groups = [
            TableGroup(list(alike), device, optimizer, execution)
            for _, alike in itertools.groupby(own, key=lambda table: table.structure)
        ]
        self._plans: list[_Plan] = []
        self.matrices: list[EmbeddingMatrix] = []
        self._make_lookups([table.parts[0].table for table in own])
        self.lookups: list[Lookup] = list(self.matrices)
        self._order = self._find_order()

    def _make_lookups(self, numbers: Sequence[int]) -> None:
        """Make a lookup and a matrix for each dimension of this rank's parts.

        Args:
            numbers: the numbers of this rank's tables, in the exchange's order.
        """
        pieces_of: dict[int, list[tuple[int, int]]] = {}
        for k, group in enumerate(self._groups):
            for place, parts in enumerate(group.looked_up):
                pieces_of.setdefault(parts[0].dim, []).append((k, place))
        # a rank without tables looks nothing up, but takes part in the exchange of the gradients
        for dim, pieces in (pieces_of or {self._dim: []}).items():
            by_piece = [self._groups[k].looked_up[place] for k, place in pieces]
            parts = [part for of_piece in by_piece for part in of_piece]
            columns = [numbers.index(part.table) for part in parts]
            sized = tuple(
                (*piece, len(of_piece)) for piece, of_piece in zip(pieces, by_piece, strict=True)
            )
            self._plans.append(_Plan(TablePick(columns, len(numbers), self._device), sized))
            self.matrices.append(
                EmbeddingMatrix(
                    parts,
                    dim,
                    self._device,
                    self._optimizer,
                    self.learned_pooling,
                    self._execution,
                )
            )

    def _find_order(self) -> torch.Tensor | None:
        """(T,) position of each table in the exchange's order; None: they are in order."""
        exchanged = [number for of_rank in self.exchange.tables_of for number in of_rank]
        positions = [exchanged.index(number) for number in range(len(exchanged))]
        if positions == list(range(len(positions))):
            return None
        return torch.tensor(positions, device=self._device)

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
            bags = self.exchange.ids_to_tables(bags, rows_per_rank)
        vectors = self._look_up(bags, sum(rows_per_rank), update)
        with phase("exchange"):
            vectors = self.exchange.vectors_to_rows(vectors, rows_per_rank)
        return vectors if self._order is None else vectors.index_select(1, self._order)

    def _look_up(self, bags: Bags, num_rows: int, update: Update | None) -> torch.Tensor:
        """Bags of B rows in this rank's t tables -> the tables' vectors (B, t, D)."""
        pooled: dict[tuple[int, int], torch.Tensor] = {}
        for plan, matrix in zip(self._plans, self.lookups, strict=True):
            vectors = matrix.look_up(plan.pick(bags), update)
            if self._execution.lower is not None:
                vectors = vectors.to(self._execution.lower)
            vectors = vectors.view(num_rows, len(matrix.parts), matrix.dim)
            if not plan.pieces:  # this rank has no tables
                return vectors
            sizes = [size for _, _, size in plan.pieces]
            columns = vectors.split(sizes, dim=1) if len(sizes) > 1 else [vectors]
            for (k, place, _), piece in zip(plan.pieces, columns, strict=True):
                pooled[k, place] = piece
        joined = [
            group.join([pooled[k, place] for place in range(len(group.looked_up))], update)
            for k, group in enumerate(self._groups)
        ]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)

    def replace_matrices(self, make_twin: Callable[[EmbeddingMatrix], Lookup]) -> None:
        """Look up in twins of the matrices, which are freed: no part can be trained or saved then.

        Args:
            make_twin: returns what takes a matrix's place.
        """
        for k, matrix in enumerate(self.matrices):
            self.lookups[k] = make_twin(matrix)
        self.matrices = []

    def _stores(self) -> list[PartMatrix]:
        """The matrices of all parts of this rank, with those of projections."""
        projections = [group.projections for group in self._groups if group.projections is not None]
        return [*self.matrices, *projections]

    def apply_kept(self, update: Update) -> None:
        """Apply the gradients that are kept, if there are any, unless the step has overflowed.

        A scaled loss keeps them until the end of the step, and a batch at whose end the step is due
        leaves those of the batches before it if it is skipped.
        """
        for store in self._stores():
            store.apply_kept(update)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all parts, table by table, from numpy's global generator.

        Every rank draws every part and keeps its own ones, so the numbers are those of one process.
        """
        for part, view in self.part_views("weight"):
            _draw_uniform(part, view)

    def row_shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """The shape of a row of each of a part's tensors, by the names that `part_views` takes.

        They are `weight`, the optimiser's state by its own names and, with learned pooling,
        `pooling` and the state of the pooling weights as `pooling.sum`.

        Args:
            part: a part of any rank.
        """
        of_elements = ELEMENT_OPTIMIZERS[self._optimizer]
        rule = TABLE_OPTIMIZERS[self._optimizer] if part.is_looked_up else of_elements
        shapes = {"weight": (part.dim,), **rule.state_shapes(part.dim)}
        if self.learned_pooling:
            shapes["pooling"] = ()
            shapes |= {f"pooling.{name}": () for name in of_elements.state_shapes(1)}
        return shapes

    def part_view(self, part: Part, name: str) -> torch.Tensor | None:
        """The part's rows of its tensor of that name; None if it is not held here."""
        for store in self._stores():
            if part in store.parts:
                return store.part_view(name, part)
        return None

    def part_views(self, name: str) -> Iterator[tuple[Part, torch.Tensor | None]]:
        """(part, its rows of the tensor of that name) of all parts that have one."""
        for part in self.parts:
            if name in self.row_shapes(part):
                yield part, self.part_view(part, name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part, view in self.part_views("weight"):
            if view is not None:
                destination[f"{prefix}{part.key}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for part, view in self.part_views("weight"):
            if view is not None:
                view.copy_(state_dict[f"{prefix}{part.key}"][part.begin : part.end])


def _draw_uniform(part: Part, view: torch.Tensor | None) -> None:
    """Draw the part's rows, some at a time, into the view; None: draw and forget them."""
    rows_per_draw = max(1, VALUES_PER_DRAW // part.dim)
    for begin in range(0, part.num_rows, rows_per_draw):
        size = (min(rows_per_draw, part.num_rows - begin), part.dim)
        values = np.random.uniform(low=-part.bound, high=part.bound, size=size)
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
