"""The exchange whose messages have shapes that do not depend on ids: that of NPUs and GPUs."""

from collections.abc import Sequence

import torch

from model.batch import Bags, TablePick, ids_of_bags
from model.exchange import Exchange, Trip
from model.lookup_groups import LookupGroup
from model.rows_of_ids import RowsOfIds, is_plain, shifts_of
from model.travel import Travel, Types
from optim.update import Update
from ranks.collectives import all_to_all
from ranks.placement import LogicalTable, Matrix, Placement
from ranks.process import Process

MOST_ROWS = torch.iinfo(torch.int32).max  # of a matrix whose rows int32 can tell


class StaticExchange(Exchange):
    """Sends ids to all ranks that have a part of their matrix, and a vector back for each of these.

    Every rank that has a part of a matrix gets the ids of all rows of the batch and returns a
    vector for each row, which is 0 where it has none of the ids: vectors of a matrix's parts are
    summed where they arrive. So the shapes of all messages follow from the number of rows and ids,
    never from the ids, as an NPU's operators and recorded steps want it, and the host need not wait
    for the device. docs/scaling.md has what that costs. Both directions use one order: rank by
    rank, on a rank the groups one after the other.

    Args:
        process: this rank.
        tables: all T tables.
        placement: which ranks have their rows.
        types: of the vectors, and of their numbers on their way.

    Attributes:
        columns: the vectors of each group's parts as they arrive.
        widths: how many numbers a rank sends for each row and group, by rank.
    """

    is_routed = False

    def __init__(
        self,
        process: Process,
        tables: Sequence[LogicalTable],
        placement: Placement,
        types: Types = Types(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__(process, tables, placement, types)
        self.columns = [_Columns(group, process.device) for group in self.groups]
        self.slots = [columns.slots for columns in self.columns]
        self.widths = [
            [group.dim * len(group.parts[rank]) for group in self.groups]
            for rank in range(process.world_size)
        ]
        self._tables_of = [
            sorted({part.matrix.table for group in self.groups for part in group.parts[rank]})
            for rank in range(process.world_size)
        ]
        in_order = [number for of_rank in self._tables_of for number in of_rank]
        self._order = torch.tensor(in_order, dtype=torch.int64, device=process.device)
        own = self._tables_of[process.rank]
        self._own = [
            (
                TablePick(
                    [own.index(part.matrix.table) for part in parts], len(own), process.device
                ),
                RowsOfIds(parts, process.device),
            )
            for group in self.groups
            if (parts := group.parts[process.rank])
        ]
        self.shifts = self._shifts_of_all()

    def _shifts_of_all(self) -> torch.Tensor | None:
        """The shifts of all ids if this rank has all tables, as they are, in one matrix."""
        parts = self.groups[0].parts[self.process.rank]
        is_alone = len(self.groups) == self.process.world_size == 1
        tables = [part.matrix.table for part in parts if is_plain(part)]
        num_rows = sum(part.num_rows for part in parts)
        if not is_alone or tables != list(range(self._num_tables)) or num_rows > MOST_ROWS:
            return None
        return torch.tensor(shifts_of(parts), dtype=torch.int32, device=self.process.device)

    def begin(self, bags: Bags, rows_per_rank: Sequence[int], update: Update | None) -> Trip:
        """Send this rank's ids to the ranks that have the rows, and receive those of all ranks.

        Args:
            bags: those of this rank's b rows, in the order of the tables.
            rows_per_rank: rows of the batch on each rank, B in all.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        if not any(map(any, self.widths)):  # on no rank: what is empty need not be sent
            return _NothingTravels(self, rows_per_rank[self.process.rank])
        if self.process.world_size > 1:
            bags = self._ids_to_tables(bags, rows_per_rank)
        if bags.are_rows:
            return _StayAtHome([bags], sum(rows_per_rank))
        of_own = [rows_of_ids(pick(bags)) for pick, rows_of_ids in self._own]
        if self.process.world_size == 1:
            return _StayAtHome(of_own, sum(rows_per_rank))
        return _StaticTrip(self, of_own, rows_per_rank, update)

    def _ids_to_tables(self, bags: Bags, rows_per_rank: Sequence[int]) -> Bags:
        """Bags of this rank's rows in all tables -> bags of all ranks' rows in this rank's tables.

        Returns:
            Bags of B rows, ordered by rank, and of this rank's tables in their order.
        """
        process, rank = self.process, self.process.rank
        own_tables = self._tables_of[rank]
        send = [rows_per_rank[rank] * len(tables) for tables in self._tables_of]
        receive = [rows * len(own_tables) for rows in rows_per_rank]
        if bags.lengths is None:
            ids = self._columns_by_rank(bags.ids.view(rows_per_rank[rank], self._num_tables))
            return Bags(all_to_all(process, ids.int(), send, receive))
        lengths = self._columns_by_rank(bags.lengths)
        received = all_to_all(process, lengths.int(), send, receive).long()
        assert bags.ids_per_rank is not None
        begins = self._columns_by_rank(bags.begins())
        send = [int(bags.ids_per_rank[rank, tables].sum()) for tables in self._tables_of]
        ids = ids_of_bags(bags.ids, begins, lengths, sum(send))
        ids_per_rank = bags.ids_per_rank[:, own_tables]
        ids = all_to_all(process, ids.int(), send, ids_per_rank.sum(1).tolist())
        return Bags(ids, received.view(sum(rows_per_rank), len(own_tables)), ids_per_rank)

    def _columns_by_rank(self, columns: torch.Tensor) -> torch.Tensor:
        """(b, T) -> flat, a number for each row and table: rank by rank, on a rank row by row."""
        widths = [len(tables) for tables in self._tables_of]
        return torch.cat(
            [share.reshape(-1) for share in columns[:, self._order].split(widths, dim=1)]
        )


class _NothingTravels:
    """The trip where all matrices are on every rank."""

    bags: Sequence[Bags] = ()

    def __init__(self, exchange: StaticExchange, num_rows: int) -> None:
        types, device = exchange.types, exchange.process.device
        self._vectors = [
            torch.empty(num_rows, 0, group.dim, dtype=types.vectors, device=device)
            for group in exchange.groups
        ]

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        assert not vectors

    def arrive(self) -> list[torch.Tensor]:
        return self._vectors


class _StayAtHome:
    """The trip of a rank that is alone."""

    def __init__(self, bags: Sequence[Bags], num_rows: int) -> None:
        self.bags, self._num_rows = bags, num_rows

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        self._vectors = vectors

    def arrive(self) -> list[torch.Tensor]:
        return [one.view(self._num_rows, -1, one.shape[-1]) for one in self._vectors]


class _StaticTrip:
    """A trip whose messages have a vector for each row of the batch and each part."""

    def __init__(
        self,
        exchange: StaticExchange,
        bags: Sequence[Bags],
        rows_per_rank: Sequence[int],
        update: Update | None,
    ) -> None:
        process = exchange.process
        self.bags, self._columns, self._widths = bags, exchange.columns, exchange.widths
        self._num_rows, self._rows = sum(rows_per_rank), rows_per_rank[process.rank]
        send = [rows * sum(self._widths[process.rank]) for rows in rows_per_rank]
        self._receive = [self._rows * sum(widths) for widths in self._widths]
        self._travel = Travel(process, send, self._receive, exchange.types, update)

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        if len(vectors) > 1:  # what goes to a rank lies together
            vectors = [torch.cat([one.view(self._num_rows, -1) for one in vectors], dim=1)]
        self._travel.depart([one.reshape(-1) for one in vectors])

    def arrive(self) -> list[torch.Tensor]:
        by_rank = zip(self._travel.arrive().split(self._receive), self._widths, strict=True)
        of_ranks = [
            part.view(self._rows, sum(widths)).split(widths, dim=1) for part, widths in by_rank
        ]
        return [
            one.sum_parts(torch.cat(of_group, dim=1))
            for one, of_group in zip(self._columns, zip(*of_ranks, strict=True), strict=True)
        ]


class _Columns:
    """The vectors of a group's parts as they arrive, rank by rank.

    Attributes:
        group: the group.
        slots: the matrices in the order of `sum_parts`.
    """

    def __init__(self, group: LookupGroup, device: torch.device) -> None:
        self.group = group
        places: dict[Matrix, list[int]] = {}
        columns = [part.matrix for of_rank in group.parts for part in of_rank]
        for place, matrix in enumerate(columns):
            places.setdefault(matrix, []).append(place)
        self._num_columns, self._is_cut = len(columns), len(places) < len(columns)
        by_count: dict[int, list[Matrix]] = {}
        for matrix, found in places.items():
            by_count.setdefault(len(found), []).append(matrix)
        self.slots = tuple(matrix for alike in by_count.values() for matrix in alike)
        # (number of parts, columns of the matrices that have so many)
        self._alike = [
            (
                count,
                torch.tensor([place for one in alike for place in places[one]], device=device),
            )
            for count, alike in by_count.items()
        ]

    def sum_parts(self, columns: torch.Tensor) -> torch.Tensor:
        """Vectors of parts (b, parts * d) -> of matrices (b, matrices, d).

        Parts are added in their order, so the sums are the same in each run.
        """
        columns = columns.view(len(columns), self._num_columns, self.group.dim)
        if not self._is_cut:
            return columns
        return torch.cat(
            [
                columns.index_select(1, places).unflatten(1, (-1, count)).sum(2)
                for count, places in self._alike
            ],
            dim=1,
        )
