"""A batch: one compact block that travels to the device, and the tensors that it becomes there."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from common.draw_state import DrawState
from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE, NUM_DENSE, NUM_SPARSE
from criteo.row_layout import Layout
from devices.gpu import triton_kernels

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bags:
    """Bags of ids of B rows in T tables, ordered by row and, within a row, by table.

    Attributes:
        ids: (n,) int32 or int64; if `are_rows`, rows of the matrix that has all tables.
        lengths: (B, T) int64; None: every bag holds one id, so n = B * T.
        ids_per_rank: (ranks, T), on the host: number of ids that each rank's rows have in each
            table. It is needed if bags have lengths and tables are picked: the host then knows
            how many ids there will be, and need not wait for the device.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None = None
    ids_per_rank: npt.NDArray[np.int64] | None = None
    are_rows: bool = False

    def of_rank(self, rank: int) -> "Bags":
        """These bags, if they are those of one rank's rows alone: other ranks' do not count."""
        if self.ids_per_rank is None:
            return self
        return replace(self, ids_per_rank=self.ids_per_rank[rank : rank + 1])

    def begins(self) -> torch.Tensor:
        """(B, T) position of each bag's first id; for bags with lengths only."""
        assert self.lengths is not None
        return self.lengths.reshape(-1).cumsum(0).view_as(self.lengths) - self.lengths


def ids_of_bags(
    ids: torch.Tensor, begins: torch.Tensor, lengths: torch.Tensor, num_ids: int
) -> torch.Tensor:
    """The ids of some bags, one bag after the other.

    Args:
        ids: those of all bags.
        begins: (n,) position of the first id of each bag.
        lengths: (n,) number of its ids.
        num_ids: sum of the lengths, which the host must know without waiting for the device.
    """
    shifts = begins - (lengths.cumsum(0) - lengths)  # from the new order to that of `ids`
    shift_of_id = torch.repeat_interleave(shifts, lengths, output_size=num_ids)
    return ids[shift_of_id + torch.arange(num_ids, device=ids.device)]


class TablePick:
    """Picks the bags of some tables out of those of all tables.

    Args:
        tables: the numbers of the tables wanted, in the order wanted; one may come twice.
        num_tables: how many tables there are.
        device: where the bags are.
    """

    def __init__(self, tables: Sequence[int], num_tables: int, device: torch.device) -> None:
        self._tables, self._num_tables = list(tables), num_tables
        self._takes_all = self._tables == list(range(num_tables))
        self._on_device = torch.tensor(self._tables, dtype=torch.int64, device=device)

    def __call__(self, bags: Bags) -> Bags:
        """Bags of B rows in all tables -> bags of B rows in the tables wanted."""
        if self._takes_all:
            return bags
        if bags.lengths is None:
            ids = bags.ids.view(-1, self._num_tables).index_select(1, self._on_device)
            return Bags(ids.view(-1))
        assert bags.ids_per_rank is not None
        ids_per_rank = bags.ids_per_rank[:, self._tables]
        lengths = bags.lengths.index_select(1, self._on_device)
        begins = bags.begins().index_select(1, self._on_device).view(-1)
        ids = ids_of_bags(bags.ids, begins, lengths.view(-1), int(ids_per_rank.sum()))
        return Bags(ids, lengths, ids_per_rank)


@dataclass(frozen=True)
class Decoding:
    """What a model wants to be made of a batch.

    Attributes:
        triton: one kernel makes it, if there is one for this kind of batch.
        lower: type of the dense features, which then have zeros after them up to a width that
            tensor cores take; None: float32. For the kernel only.
        shifts: (T,) int32 that lead from ids of the tables to rows of one matrix; None: ids stay
            ids. For the kernel only.
    """

    triton: bool = False
    lower: torch.dtype | None = None
    shifts: torch.Tensor | None = None


@dataclass(frozen=True)
class Features:
    """A batch of b rows as the model takes it.

    Attributes:
        dense: (b, m) float32, or as a Decoding says.
        bags: the ids of the rows in T tables.
        label: (b, 1) float32.
    """

    dense: torch.Tensor
    bags: Bags
    label: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A rank's b rows of a batch as one contiguous block of bytes.

    Only the block travels to the device; `decode` makes the model's tensors of it there.

    Attributes:
        block: the bytes of this rank's rows, padding included.
        num_rows: b, rows of this rank, padding included.
        rows_per_rank: the same number for each rank.
        num_padding: rows that `padded` added after this rank's own; they do not count.
        state_after: where a run that goes on after this batch begins to draw; None: at batch 0, or
            batches are not drawn but read.
    """

    block: torch.Tensor
    num_rows: int
    rows_per_rank: tuple[int, ...]
    num_padding: int = field(default=0, kw_only=True)
    state_after: DrawState | None = field(default=None, kw_only=True)

    def pin_memory(self) -> "Batch":
        """The batch with its block in page-locked memory; torch's loader calls this."""
        return replace(self, block=self.block.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch with its block on the device."""
        if self.block.device == device:
            return self
        return replace(self, block=self.block.to(device, non_blocking=True))

    def chunks(self, max_rows: int) -> list["Batch"]:
        """The batch cut into consecutive chunks, of which all ranks get the same number.

        Bags of any length are not cut.

        Args:
            max_rows: most rows of a chunk, on each rank.
        """
        return [self]

    def padded(self, num_rows: int) -> "Batch":
        """The batch with `num_rows` rows on each rank; bags of any length are not padded."""
        return self

    def mask(self) -> torch.Tensor | None:
        """(b, 1) 1 for rows that count, 0 for padding; None: all rows count."""
        if not self.num_padding:
            return None
        ones = torch.ones(self.num_rows, 1, device=self.block.device)
        ones[self.num_rows - self.num_padding :] = 0
        return ones

    def decode(self, wanted: Decoding = Decoding()) -> Features:  # noqa: B008 (it is frozen)
        """The model's tensors, on the block's device.

        Args:
            wanted: what the model takes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CriteoBatch(Batch):
    """Rows of Criteo data: label, 13 integers, 26 ids. The block is (b, bytes of a row) uint8.

    Attributes:
        layout: the bytes of each column.
    """

    layout: Layout

    def chunks(self, max_rows: int) -> list[Batch]:
        """Chunks whose sizes differ by at most one row, and whose blocks are views of this one."""
        num_chunks = -(-max(self.rows_per_rank) // max_rows)
        if num_chunks <= 1:
            return [self]
        by_rank = [split_evenly(rows, num_chunks) for rows in self.rows_per_rank]
        blocks = self.block.split(split_evenly(self.num_rows, num_chunks))
        return [
            CriteoBatch(block, len(block), rows_per_rank, self.layout)
            for block, rows_per_rank in zip(blocks, zip(*by_rank, strict=True), strict=True)
        ]

    def padded(self, num_rows: int) -> Batch:
        """The batch with rows of zeros at its end: label 0 and the first id of each table."""
        if set(self.rows_per_rank) == {num_rows}:
            return self
        missing = num_rows - self.num_rows
        return replace(
            self,
            block=F.pad(self.block, (0, 0, 0, missing)),
            num_rows=num_rows,
            rows_per_rank=(num_rows,) * len(self.rows_per_rank),
            num_padding=missing,
        )

    def decode(self, wanted: Decoding = Decoding()) -> Features:  # noqa: B008 (it is frozen)
        """Integers x become log(x + 1); every bag holds one id."""
        if wanted.triton:
            columns, shifts = _column_bytes(self.block.device, self.layout), wanted.shifts
            dense, ids, label = triton_kernels().decode(
                self.block, columns, NUM_DENSE, NUM_SPARSE, wanted.lower, shifts
            )
            return Features(dense, Bags(ids.view(-1), are_rows=shifts is not None), label)
        if self.block.device.type == "cpu":
            arrays = self.layout.decode(self.block.numpy())
            dense, ids, label = (torch.from_numpy(array) for array in arrays)
        else:
            columns = _unpack(self.block, self.layout)
            dense, ids = columns[:, 1:FIRST_SPARSE].float(), columns[:, FIRST_SPARSE:]
            label = columns[:, :1].float()
        return Features(dense.add_(1).log_(), Bags(ids.reshape(-1)), label)


@functools.cache
def _column_bytes(device: torch.device, layout: Layout) -> torch.Tensor:
    """(2, 40) int32 on the device: first byte and width of each column."""
    columns = np.stack([layout.offsets, layout.widths]).astype(np.int32)
    return torch.from_numpy(columns).to(device)


def _unpack(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows (b, bytes of a row) uint8 -> columns (b, 40) int32, by operators of any device."""
    columns = {}
    for width, begin, end in layout.width_groups:
        # a view of another type needs aligned memory
        group = rows[:, begin:end].clone(memory_format=torch.contiguous_format)
        if width == 4:
            columns[width] = group.view(torch.int32)
        elif width == 2:  # not all devices have unsigned types
            columns[width] = group.view(torch.int16).int() & 0xFFFF
        else:
            columns[width] = group.int()
    stretches = [columns[width][:, begin:end] for width, begin, end in layout.stretches]
    return torch.cat(stretches, dim=1)


@dataclass(frozen=True)
class BagBatch(Batch):
    """Rows with bags of any length.

    The block is int32: the bits of dense (b, m) and label (b,), then lengths of bags (b, T), ids.

    Attributes:
        num_dense: m.
        num_tables: T.
        ids_per_rank: (ranks, T) number of ids that each rank's rows have in each table.
    """

    num_dense: int
    num_tables: int
    ids_per_rank: Ints

    def decode(self, wanted: Decoding = Decoding()) -> Features:  # noqa: B008 (it is frozen)
        """The model's tensors on any device; all but the lengths are views of the block."""
        rows = self.num_rows
        ends = np.cumsum([rows * self.num_dense, rows, rows * self.num_tables])
        dense, label, lengths, ids = torch.tensor_split(self.block, [int(end) for end in ends])
        bags = Bags(ids, lengths.long().view(rows, self.num_tables), self.ids_per_rank)
        return Features(
            dense.view(torch.float32).view(rows, self.num_dense),
            bags,
            label.view(torch.float32).view(rows, 1),
        )
