"""A batch: one compact block that travels to the device, and the tensors that it becomes there."""

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE, NUM_DENSE, NUM_SPARSE
from criteo.row_layout import Layout
from devices.gpu import triton_kernels

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bags:
    """Bags of ids of B rows in T tables, ordered by row and, within a row, by table.

    Attributes:
        ids: (n,) int32 or int64.
        lengths: (B, T) int64; None: every bag holds one id, so n = B * T.
        ids_per_rank: (ranks, T), on the host: number of ids that each rank's rows have in each
            table. An exchange between ranks needs it if bags have lengths.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None = None
    ids_per_rank: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Features:
    """A batch of b rows as the model takes it.

    Attributes:
        dense: (b, m) float32.
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
    """

    block: torch.Tensor
    num_rows: int
    rows_per_rank: tuple[int, ...]
    num_padding: int = field(default=0, kw_only=True)

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

    def decode(self, triton: bool = False) -> Features:
        """The model's tensors, on the block's device.

        Args:
            triton: one kernel makes them, if there is one for this kind of batch.
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

    def decode(self, triton: bool = False) -> Features:
        """Integers x become log(x + 1); every bag holds one id."""
        if triton:
            columns = _column_bytes(self.block.device, self.layout)
            kernel = triton_kernels().decode
            logarithms, ids, label = kernel(self.block, columns, NUM_DENSE, NUM_SPARSE)
            return Features(logarithms, Bags(ids.view(-1)), label)
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

    def decode(self, triton: bool = False) -> Features:
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
