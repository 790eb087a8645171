"""The exchange of a CPU: an id goes to the rank that has its row, and to no other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from devices.routing_kernels import Requests, RoutedMatrices, route
from model.batch import Bags
from model.exchange import Exchange, Trip
from model.lookup_groups import LookupGroup
from model.rows_of_ids import shifts_of
from model.static_exchange import StaticExchange
from model.travel import Travel, Types
from optim.update import Update
from ranks.collectives import all_to_all
from ranks.placement import LogicalTable, Matrix, Placement
from ranks.process import Process

Counts = npt.NDArray[np.int64]  # (ranks, groups)


def make_exchange(
    process: Process, tables: Sequence[LogicalTable], placement: Placement, types: Types
) -> Exchange:
    """The exchange that suits the device: the host of an NPU or GPU does not read ids.

    Args:
        process: this rank.
        tables: all T tables.
        placement: which ranks have their rows.
        types: of the vectors, and of their numbers on their way.
    """
    is_routed = process.device.type == "cpu" and placement.is_cut
    kind = RoutedExchange if is_routed else StaticExchange
    return kind(process, tables, placement, types)


class RoutedExchange(Exchange):
    """Moves an id to the rank that has its row, and a vector back for each bag and such rank.

    The host reads the ids, so a matrix costs no more for being cut. Sizes of messages follow from
    the ids: ranks first tell one another how much they will send.

    Args:
        process: this rank.
        tables: all T tables.
        placement: which ranks have their rows.
        types: of the vectors, and of their numbers on their way.
    """

    is_routed = True

    def __init__(
        self,
        process: Process,
        tables: Sequence[LogicalTable],
        placement: Placement,
        types: Types = Types(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__(process, tables, placement, types)
        self.slots = [group.travelling for group in self.groups]
        self._matrices = _as_arrays(self.groups)

    def begin(self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None) -> Trip:
        """Send this rank's ids to the ranks that have the rows, and receive what is asked of it.

        Args:
            bags: those of this rank's b rows, in the order of the tables.
            rows_per_rank: rows of the batch on each rank, B in all.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        own_rows, dims = rows_per_rank[self.process.rank], [group.dim for group in self.groups]
        asked = self._route(bags, own_rows)
        ask = np.stack([asked.num_rows, asked.num_bags]).reshape(2, -1, len(dims))
        give = self._tell(ask)
        lengths: list[torch.Tensor | None] = [None] * len(dims)
        rows = self._send(asked.rows, ask[0], give[0])
        if bags.lengths is not None:
            own = asked.lengths.astype(np.int32)
            lengths = [one[:, None] for one in self._send(own, ask[1], give[1])]
        (_, ask_bags), (_, give_bags) = ask, give
        sizes = (give_bags @ dims).tolist(), (ask_bags @ dims).tolist()
        travel = Travel(self.process, *sizes, self.types, update)
        asked_of = list(map(Bags, rows, lengths))
        return _RoutedTrip(self, asked_of, travel, give_bags, asked, own_rows)

    def _route(self, bags: Bags, num_rows: int) -> Requests:
        """What this rank asks of all ranks."""
        shape = num_rows, self._num_tables
        lengths = torch.ones(shape, dtype=torch.int64) if bags.lengths is None else bags.lengths
        begins = Bags(bags.ids, lengths).begins()
        arrays = [tensor.numpy() for tensor in (bags.ids.long(), begins, lengths)]
        num_keys = self.process.world_size * len(self.groups)
        return route(*arrays, self._matrices, len(self.groups), num_keys)

    def _tell(self, ask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tell each rank how much it is asked for; returns how much each asks this one for.

        Both are (2, ranks, groups): rows and bags.
        """
        by_rank = torch.from_numpy(ask.transpose(1, 0, 2).copy())
        sizes = [by_rank[0].numel()] * len(by_rank)
        received = all_to_all(self.process, by_rank.view(-1), sizes, sizes)
        return received.view_as(by_rank).numpy().transpose(1, 0, 2)

    def _send(self, numbers: npt.NDArray[Any], send: Counts, receive: Counts) -> list[torch.Tensor]:
        """Send whole numbers to all ranks; returns those of all ranks for each group, as int64."""
        sizes = send.sum(1).tolist(), receive.sum(1).tolist()
        received = all_to_all(self.process, torch.from_numpy(numbers), *sizes)
        return _by_group(received.long(), receive)


def _by_group(numbers: torch.Tensor, counts: Counts) -> list[torch.Tensor]:
    """Numbers ordered by rank, and on a rank by group -> those of each group, ordered by rank."""
    num_groups = counts.shape[1]
    parts = numbers.split(counts.reshape(-1).tolist())
    return [torch.cat(parts[group::num_groups]) for group in range(num_groups)]


class _RoutedTrip:
    """A trip whose messages have a vector for each bag that was asked for.

    Args:
        exchange: what it is a trip of.
        bags: for each group, the bags of rows that all ranks have asked this one for.
        travel: the way of the vectors.
        give: bags that each rank has asked this one for.
        asked: what this rank has asked all ranks for.
        num_rows: b, rows of the batch on this rank.
    """

    def __init__(
        self,
        exchange: Exchange,
        bags: Sequence[Bags],
        travel: Travel,
        give: Counts,
        asked: Requests,
        num_rows: int,
    ) -> None:
        rank = exchange.process.rank
        own = [k for k, group in enumerate(exchange.groups) if group.parts[rank]]
        self.bags: Sequence[Bags] = [bags[k] for k in own]
        self._travel, self._give = travel, give[:, own]
        self._dims = np.array([group.dim for group in exchange.groups])
        self._num_slots = [len(slots) for slots in exchange.slots]
        self._ask, self._num_rows = asked.num_bags.reshape(-1, len(self._dims)), num_rows
        self._targets = _by_group(torch.from_numpy(asked.targets), self._ask)

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        by_rank = [
            one.split(counts.tolist()) for one, counts in zip(vectors, self._give.T, strict=True)
        ]
        self._travel.depart(
            [part.reshape(-1) for one in zip(*by_rank, strict=True) for part in one]
        )

    def arrive(self) -> list[torch.Tensor]:
        of_groups = _by_group(self._travel.arrive(), self._ask * self._dims)
        return [
            flat.new_zeros(self._num_rows * slots, dim)
            .index_add(0, targets, flat.view(len(targets), dim))
            .view(self._num_rows, slots, dim)
            for flat, targets, slots, dim in zip(
                of_groups, self._targets, self._num_slots, self._dims.tolist(), strict=True
            )
        ]


def _as_arrays(groups: Sequence[LookupGroup]) -> RoutedMatrices:
    """The matrices whose vectors travel, and their parts."""
    matrices, parts, first_part = [], [], [0]
    for number, group in enumerate(groups):
        parts_of: dict[Matrix, list[tuple[int, int, int]]] = {}
        for of_rank in group.parts:
            for part, shift in zip(of_rank, shifts_of(of_rank), strict=True):
                parts_of.setdefault(part.matrix, []).append((part.begin, part.rank, shift))
        for slot, matrix in enumerate(group.travelling):
            places = matrix.table, matrix.divisor, matrix.modulus, number, slot
            matrices.append((*places, len(group.travelling)))
            parts += sorted(parts_of[matrix])
            first_part.append(len(parts))
    of_matrices = np.array(matrices, np.int64).reshape(-1, 6).T.copy()
    begin, rank, shift = np.array(parts, np.int64).reshape(-1, 3).T.copy()
    of_parts = np.array(first_part, np.int64), begin, rank, shift.astype(_type_of_rows(groups))
    return RoutedMatrices._make([*of_matrices, *of_parts])


def _type_of_rows(groups: Sequence[LookupGroup]) -> type:
    """int32, or int64 if a rank's parts of a group together have more rows than that can tell."""
    held = (sum(part.num_rows for part in parts) for group in groups for parts in group.parts)
    return np.int32 if max(held, default=0) <= np.iinfo(np.int32).max + 1 else np.int64
