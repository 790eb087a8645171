"""Processes: who this one is, which rows and tables are whose, and what travels between ranks.

One process is the general case: with a world of one every exchange below gives back what it got.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from command_line import UserError, environment_int
from devices import find_device

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Process:
    """One rank of a run: its place among the ranks, its device, the backend that joins them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that prints, measures and saves."""
        return self.rank == 0


def this_process(device_type: str, card: int = -1, backend: str = "") -> Process:
    """The launch facts from the environment (RANK, WORLD_SIZE, LOCAL_RANK), and the device.

    Args:
        device_type: cpu, cuda or npu.
        card: which card; -1: the launcher's LOCAL_RANK.
        backend: of torch.distributed; empty: the device's own.

    Raises:
        UserError: the device is not there, or the backend does not serve it.
    """
    rank, world_size = environment_int("RANK", 0), environment_int("WORLD_SIZE", 1)
    local_rank = environment_int("LOCAL_RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={world_size} but {', '.join(missing)} not set:"
            " start the ranks with torchrun"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world_size}: expected 0 to {world_size - 1}")
    device = find_device(device_type, card if card >= 0 else local_rank)
    return Process(rank, world_size, local_rank, device, _backend_for(device_type, backend))


def _backend_for(device_type: str, backend: str) -> str:
    own = BACKENDS[device_type]
    backend = backend or own
    available = {"mpi": dist.is_mpi_available, "gloo": dist.is_gloo_available}
    if backend not in (own, "mpi", "gloo") or not available.get(backend, lambda: True)():
        have = f"{own}, gloo" + (", mpi" if dist.is_mpi_available() else "; this torch has no mpi")
        raise UserError(
            f"--dist-backend={backend} does not serve {device_type} here: expected {have}",
            everywhere=True,
        )
    return backend


@contextlib.contextmanager
def joined(process: Process) -> Iterator[None]:
    """Join the ranks in a process group for the time of the block.

    One that exists already is used and left alone.
    """
    if process.world_size == 1 or dist.is_initialized():
        yield
        return
    own = process.device.type
    # nccl and hccl take no CPU tensors, and what is saved or scored travels as such
    mixed = process.backend in ("nccl", "hccl")
    backend = f"cpu:gloo,{own}:{process.backend}" if mixed else process.backend
    # torch.optim imports this, and modules below it keep the group that exists when they are
    # imported. Gloo's threads then outlive destroy_process_group and, when Python shuts down under
    # them, end the process with SIGABRT ("terminate called without an active exception").
    importlib.import_module("torch._dynamo")
    dist.init_process_group(backend, rank=process.rank, world_size=process.world_size)
    try:
        yield
    except RuntimeError as error:
        if says_that_a_rank_has_gone(error):
            raise UserError("another rank has ended: its own log says why") from error
        raise
    dist.destroy_process_group()  # not after an error: other ranks may be inside a collective


def says_that_a_rank_has_gone(error: BaseException) -> bool:
    """It is what a collective raises when another rank has ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


# ---------------------------------------------------------------- whose rows, whose tables


def split_rows(num_rows: int, world_size: int) -> list[int]:
    """Rows of a batch that each rank computes: consecutive shares, the first may be one longer."""
    return [num_rows // world_size + (rank < num_rows % world_size) for rank in range(world_size)]


def share_of_rows(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(begin, end) of the rank's share in `split_rows`."""
    shares = split_rows(num_rows, world_size)
    begin = sum(shares[:rank])
    return begin, begin + shares[rank]


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


# ---------------------------------------------------------------- ids to tables, vectors back


@dataclass(frozen=True)
class Bags:
    """Bags of indices of B rows and T tables, row by row and in a row table by table.

    Args:
        ids: (n,) int32 or int64.
        lengths: (B, T) int64, or None where every bag holds one id (n = B * T).
        ids_per_rank: (ranks, T), on the host: how many ids each rank's rows have; with lengths
            only.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None = None
    ids_per_rank: npt.NDArray[np.int64] | None = None


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


# ---------------------------------------------------------------- sums and gathers


def sum_over_ranks(process: Process, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message."""
    if process.world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_on_first(
    process: Process, values: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Each rank's host tensor of `sizes[rank]` leading rows, listed on rank 0; elsewhere none."""
    if process.world_size == 1:
        return [values]
    if not process.is_first:
        dist.send(values.contiguous(), 0)
        return []
    gathered = [values]
    for rank in range(1, process.world_size):
        part = values.new_empty((sizes[rank], *values.shape[1:]))
        dist.recv(part, rank)
        gathered.append(part)
    return gathered


def send_to_first(
    process: Process, tensor: torch.Tensor | None, like: torch.Tensor, owner: int
) -> torch.Tensor | None:
    """`owner`'s host tensor on rank 0 (None elsewhere); `like` has its shape and type on rank 0."""
    if owner == 0 or process.world_size == 1:
        return tensor if process.is_first else None
    if process.rank == owner:
        assert tensor is not None
        dist.send(tensor.contiguous(), 0)
    if not process.is_first:
        return None
    dist.recv(like, owner)
    return like


def from_first(process: Process, numbers: Sequence[float]) -> list[float]:
    """Rank 0's numbers on every rank."""
    values = torch.tensor(list(numbers), dtype=torch.float64)
    if process.world_size > 1:
        dist.broadcast(values, 0)
    return [float(value) for value in values]


def text_from_first(process: Process, text: str) -> str:
    """Rank 0's text on every rank."""
    found = [text]
    if process.world_size > 1:
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]
