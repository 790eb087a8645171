"""A batch: one compact block that travels to the device, and what the model sees of it there."""

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


@dataclass(frozen=True)
class Features:
    """What the device made of a batch of b rows.

    Attributes:
        dense: (b, m) float32.
        bags: of b rows and T tables.
        label: (b, 1) float32.
    """

    dense: torch.Tensor
    bags: Bags
    label: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A rank's rows of a batch as one contiguous block of bytes, and how many each rank has.

    The block is all that travels to the device; `decode` makes the model's tensors of it there.

    Attributes:
        block: of this rank's rows.
        num_rows: of this rank.
        rows_per_rank: of each rank.
        num_filled: rows at this rank's end that `filled` has added: they do not count.
    """

    block: torch.Tensor
    num_rows: int
    rows_per_rank: tuple[int, ...]
    num_filled: int = field(default=0, kw_only=True)

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory (the loader calls this)."""
        return replace(self, block=self.block.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The same with its block on the device."""
        if self.block.device == device:
            return self
        return replace(self, block=self.block.to(device, non_blocking=True))

    def pieces(self, most_rows: int) -> list["Batch"]:
        """This batch in order, as many pieces on each rank; bags of any length are one piece.

        Args:
            most_rows: of a piece, on a rank.
        """
        return [self]

    def filled(self, num_rows: int) -> "Batch":
        """This batch with `num_rows` rows on each rank; bags of any length stay as they are."""
        return self

    def counts(self) -> torch.Tensor | None:
        """(b, 1) 1 for rows that count, 0 for those that fill; None: all count."""
        if not self.num_filled:
            return None
        ones = torch.ones(self.num_rows, 1, device=self.block.device)
        ones[self.num_rows - self.num_filled :] = 0
        return ones

    def decode(self, triton: bool = False) -> Features:
        """The model's tensors, on the block's device; with Triton's kernel, if there is one."""
        raise NotImplementedError


@dataclass(frozen=True)
class CriteoBatch(Batch):
    """Block (b, bytes of a row) uint8 of rows in a layout: label, 13 integers, 26 ids."""

    layout: Layout

    def pieces(self, most_rows: int) -> list[Batch]:
        """As Batch.pieces, of nearly equal size; the blocks are views."""
        number = -(-max(self.rows_per_rank) // most_rows)
        if number <= 1:
            return [self]
        of_ranks = zip(*(split_evenly(rows, number) for rows in self.rows_per_rank), strict=True)
        blocks = self.block.split(split_evenly(self.num_rows, number))
        return [
            CriteoBatch(block, len(block), rows, self.layout)
            for block, rows in zip(blocks, of_ranks, strict=True)
        ]

    def filled(self, num_rows: int) -> Batch:
        """With zeros at the end, which are rows of label 0 and of the first id of each table."""
        if set(self.rows_per_rank) == {num_rows}:
            return self
        missing = num_rows - self.num_rows
        return replace(
            self,
            block=F.pad(self.block, (0, 0, 0, missing)),
            num_rows=num_rows,
            rows_per_rank=(num_rows,) * len(self.rows_per_rank),
            num_filled=missing,
        )

    def decode(self, triton: bool = False) -> Features:
        """Integers x become log(x + 1); every bag holds one id."""
        if triton:
            places = _places_on(self.block.device, self.layout)
            found = triton_kernels().decode(self.block, places, NUM_DENSE, NUM_SPARSE)
            return Features(found[0], Bags(found[1].view(-1)), found[2])
        if self.block.device.type == "cpu":
            arrays = self.layout.decode(self.block.numpy())
            dense, ids, label = (torch.from_numpy(array) for array in arrays)
        else:
            columns = _unpacked(self.block, self.layout)
            dense, ids = columns[:, 1:FIRST_SPARSE].float(), columns[:, FIRST_SPARSE:]
            label = columns[:, :1].float()
        return Features(dense.add_(1).log_(), Bags(ids.reshape(-1)), label)


@functools.cache
def _places_on(device: torch.device, layout: Layout) -> torch.Tensor:
    """(2, 40) int32: first byte and width of each column."""
    places = np.stack([layout.offsets, layout.widths]).astype(np.int32)
    return torch.from_numpy(places).to(device)


def _unpacked(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows (b, bytes of a row) uint8 as int32 (b, 40), by operators that any device has."""
    columns = {}
    for width, begin, end in layout.width_groups:
        part = rows[:, begin:end].clone(memory_format=torch.contiguous_format)  # so it is aligned
        if width == 4:
            columns[width] = part.view(torch.int32)
        elif width == 2:  # unsigned, which not all devices know
            columns[width] = part.view(torch.int16).int() & 0xFFFF
        else:
            columns[width] = part.int()
    stretches = [columns[width][:, begin:end] for width, begin, end in layout.stretches]
    return torch.cat(stretches, dim=1)


@dataclass(frozen=True)
class BagBatch(Batch):
    """Block, int32: bits of dense (b, m) and label (b), lengths of bags (b, T), ids."""

    num_dense: int
    num_tables: int
    ids_per_rank: Ints

    def decode(self, triton: bool = False) -> Features:
        """Bags of any length, as they were drawn."""
        rows = self.num_rows
        ends = np.cumsum([rows * self.num_dense, rows, rows * self.num_tables])
        dense, label, lengths, ids = torch.tensor_split(self.block, [int(end) for end in ends])
        bags = Bags(ids, lengths.long().view(rows, self.num_tables), self.ids_per_rank)
        return Features(
            dense.view(torch.float32).view(rows, self.num_dense),
            bags,
            label.view(torch.float32).view(rows, 1),
        )
