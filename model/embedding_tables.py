"""Embedding bags of all tables, whichever ranks hold them, under the original's names."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from common.phases import phase
from devices.execution import Execution
from model.batch import Bags, TablePick
from model.embedding_matrix import EmbeddingMatrix
from model.exchange import Exchange, Trip
from model.initial_values import draw_in_order, draw_seeded
from model.lookup_groups import LookupGroup
from model.part_matrix import PartMatrix
from model.rows_of_ids import SPARE_ROWS, RowsOfIds
from model.table_groups import TableVectors
from optim.row_optimizers import ELEMENT_OPTIMIZERS, TABLE_OPTIMIZERS
from optim.update import Update
from ranks.placement import LogicalTable, Matrix, Part


class Lookup(Protocol):
    """What a forward pass needs of an EmbeddingMatrix.

    Attributes:
        parts: the parts that it holds.
        dim: d.
    """

    parts: tuple[Part, ...]
    dim: int

    def look_up(self, bags: Bags, update: Update | None) -> torch.Tensor:
        """Bags of rows -> their pooled vectors (bags, d)."""


@dataclass(frozen=True)
class _SharedLookup:
    """The matrices of a group that every rank has.

    Attributes:
        place: where they are among the lookups.
        pick: picks the bags of their tables out of those of all tables.
        rows_of_ids: turns ids into rows.
    """

    place: int
    pick: TablePick
    rows_of_ids: RowsOfIds


class PendingVectors:
    """The pooled vectors of a forward pass, which may still be on their way.

    Args:
        trip: the way of those that travel.
        shared: (b, matrices, d) for each group, of those that every rank has; None: it has none.
        join: makes the tables' vectors of those of all groups.
    """

    def __init__(
        self,
        trip: Trip,
        shared: Sequence[torch.Tensor | None],
        join: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> None:
        self._trip, self._shared, self._join = trip, shared, join

    def wait(self) -> torch.Tensor:
        """The tables' vectors (b, T, D)."""
        with phase("exchange"):
            arrived = self._trip.arrive()
        of_groups = [
            travelled if own is None else torch.cat([travelled, own], dim=1)
            for travelled, own in zip(arrived, self._shared, strict=True)
        ]
        return self._join(of_groups)


class EmbeddingTables(nn.Module):
    """Embedding bags of T tables, summed over each bag, whichever ranks hold which rows.

    Ids travel to the ranks that have the rows. There vectors are summed over each bag; they travel
    back, and the vectors of a table's matrices are joined. Matrices that every rank holds are
    looked up for the rank's own rows, and their gradients are summed over ranks.

    Args:
        tables: all T tables; their vectors have D numbers each.
        exchange: moves ids to the ranks that have the rows, and vectors back.
        optimizer: sgd, adagrad or rwsadagrad.
        learned_pooling: each row has a trained weight in the sum over its bag; for plain tables.
        execution: how the device is used. Tables and updates stay float32.

    Attributes:
        exchange: as given.
        learned_pooling: as given.
        tables: as given.
        joins: how each table's matrices are joined.
        matrices: the rows of this rank that are looked up: one for each group of which it has
            parts, then one for each group that has shared ones.
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
        self.tables = tuple(tables)
        self.joins = tuple(table.join for table in tables)
        self._device = exchange.process.device
        rank, groups = exchange.process.rank, exchange.groups
        own = [group.parts[rank] for group in groups if group.parts[rank]]
        shared = [group.shared for group in groups if group.shared]
        self.matrices = [self._make_matrix(parts) for parts in (*own, *shared)]
        self.lookups: list[Lookup] = list(self.matrices)
        self._num_own = len(own)
        places = itertools.count(len(own))
        self._shared = [
            self._make_shared(group, next(places)) if group.shared else None for group in groups
        ]
        columns = [
            (*slots, *(part.matrix for part in group.shared))
            for slots, group in zip(exchange.slots, groups, strict=True)
        ]
        self._vectors = TableVectors(
            tables, columns, exchange.placement, self._device, optimizer, execution
        )

    def _make_matrix(self, parts: Sequence[Part]) -> EmbeddingMatrix:
        execution, is_cut = self._execution, not all(part.is_whole for part in parts)
        if self.exchange.is_routed:  # the bags that it gets are not those of all rows in columns
            execution = replace(execution, one_lookup=True)
        num_spare = SPARE_ROWS if is_cut and not self.exchange.is_routed else 0
        return EmbeddingMatrix(
            parts, self._device, self._optimizer, self.learned_pooling, execution, num_spare
        )

    def _make_shared(self, group: LookupGroup, place: int) -> _SharedLookup:
        numbers = [part.matrix.table for part in group.shared]
        pick = TablePick(numbers, len(self.tables), self._device)
        return _SharedLookup(place, pick, RowsOfIds(group.shared, self._device))

    def forward(
        self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None = None
    ) -> torch.Tensor:
        """Bags of this rank's b rows -> pooled vectors (b, T, D).

        Args:
            bags: ids of this rank's rows in all tables.
            rows_per_rank: rows of the batch on each rank.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        return self.begin(bags, rows_per_rank, update).wait()

    def begin(
        self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None = None
    ) -> PendingVectors:
        """Begin what `forward` does; what is done before the vectors are waited for hides the way.

        Args:
            bags: ids of this rank's rows in all tables.
            rows_per_rank: rows of the batch on each rank.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        with phase("exchange"):
            trip = self.exchange.begin(bags, rows_per_rank, update)
        own = self.lookups[: self._num_own]
        vectors = [
            self._look_up(matrix, rows, update) for matrix, rows in zip(own, trip.bags, strict=True)
        ]
        with phase("exchange"):
            trip.depart(vectors)
        rank = self.exchange.process.rank
        bags, num_rows = bags.of_rank(rank), rows_per_rank[rank]
        shared = [
            None if one is None else self._look_up_shared(one, bags, num_rows, update)
            for one in self._shared
        ]
        return PendingVectors(trip, shared, lambda found: self._vectors.join(found, update))

    def _look_up_shared(
        self, shared: _SharedLookup, bags: Bags, num_rows: int, update: Update | None
    ) -> torch.Tensor:
        """Bags of this rank's b rows -> the vectors (b, matrices, d) of matrices all ranks have."""
        rows, matrix = shared.rows_of_ids(shared.pick(bags)), self.lookups[shared.place]
        vectors = self._look_up(matrix, rows, update)
        return vectors.unflatten(0, (num_rows, len(matrix.parts)))

    def _look_up(self, matrix: Lookup, rows: Bags, update: Update | None) -> torch.Tensor:
        """Bags of rows -> their pooled vectors (bags, d), of the interaction's type."""
        vectors = matrix.look_up(rows, update)
        return vectors if self._execution.lower is None else vectors.to(self._execution.lower)

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
        return [*self.matrices, *self._vectors.projections]

    def apply_kept(self, update: Update) -> None:
        """Apply the gradients that are kept, if there are any, unless the step has overflowed.

        A scaled loss keeps them until the end of the step, and a batch at whose end the step is due
        leaves those of the batches before it if it is skipped. Those of shared matrices are kept
        until they have been summed over ranks.
        """
        for store in self._stores():
            store.apply_kept(update)

    def shared_gradients(self) -> list[torch.Tensor]:
        """What has to be summed over ranks before `apply_kept`, alike on all ranks."""
        return [gradient for store in self._stores() for gradient in store.shared_gradients()]

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> None:
        """Draw the rows that this rank holds.

        Args:
            seed: that of streams of the matrices' own; None: numpy's global generator, the stream
                of one process for all matrices.
        """
        held: dict[Matrix, list[tuple[Part, torch.Tensor]]] = {one: [] for one in self.all_matrices}
        for part, view in self.held_parts("weight"):
            held[part.matrix].append((part, view))
        if seed is None:
            draw_in_order(held.items())
        else:
            draw_seeded(held.items(), seed)

    @property
    def all_matrices(self) -> list[Matrix]:
        """The matrices of all tables, in their order, whichever ranks hold them."""
        return [matrix for table in self.tables for matrix in table.matrices]

    def parts_of(self, matrix: Matrix) -> tuple[Part, ...]:
        """The parts of a matrix, in the order of their rows."""
        return self.exchange.placement.parts_of(matrix)

    def row_shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        """The shape of a row of each of a matrix's tensors, by the names that `part_view` takes.

        They are `weight`, the optimiser's state by its own names and, with learned pooling,
        `pooling` and the state of the pooling weights as `pooling.sum`.
        """
        of_elements = ELEMENT_OPTIMIZERS[self._optimizer]
        rule = TABLE_OPTIMIZERS[self._optimizer] if matrix.is_looked_up else of_elements
        shapes = {"weight": (matrix.dim,), **rule.state_shapes(matrix.dim)}
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

    def held_parts(self, name: str) -> Iterator[tuple[Part, torch.Tensor]]:
        """(part, its rows of the tensor of that name) of this rank's parts that have one."""
        for part in self.exchange.placement.parts:
            if name in self.row_shapes(part.matrix):
                view = self.part_view(part, name)
                if view is not None:
                    yield part, view

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part, view in self.held_parts("weight"):
            destination[f"{prefix}{part.matrix.key}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for part, view in self.held_parts("weight"):
            view.copy_(state_dict[f"{prefix}{part.matrix.key}"][part.begin : part.end])


class PoolingWeights(nn.Module):
    """The learned pooling weights of the tables under the original's names, `v_W_l.{table}`."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self._tables = [tables]  # in a list, so that it is not a submodule twice

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part, view in self._tables[0].held_parts("pooling"):
            destination[f"{prefix}{part.matrix.table}"] = view

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for part, view in self._tables[0].held_parts("pooling"):
            view.copy_(state_dict[f"{prefix}{part.matrix.table}"][part.begin : part.end])
