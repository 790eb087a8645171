"""Gradients of table rows, kept until they are applied, in less memory than the table's."""

import numpy as np
import torch

from devices import cpu_kernels


def without_non_finite(gradients: torch.Tensor) -> torch.Tensor:
    """Replace nan and infinity by 0, so that one bad sample does not ruin a row for good."""
    return torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)


def sum_duplicates(
    rows: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of equal rows.

    Shapes depend on the number of rows, never on their values, so the host need not wait for the
    device.

    Args:
        rows: (n,) int64, in any order.
        gradients: (n, D).

    Returns:
        Rows (n,) and sums (n, D): first the distinct rows, then some rows again, with sums of 0.
    """
    in_order, order = rows.sort(stable=True)
    is_new = torch.ones_like(in_order)
    is_new[1:] = in_order[1:] != in_order[:-1]
    slot = is_new.cumsum(0) - 1
    sums = torch.zeros_like(gradients).index_add_(0, slot, gradients[order])
    return in_order.clone().index_copy_(0, slot, in_order), sums


class SortedRowGradients:
    """Keeps pairs of row and gradient, and sums those of equal rows by sorting, on any device.

    Shapes cannot follow the values, so k batches keep k times the ids of one, but never more pairs
    than the table has rows: beyond that, pairs of equal rows are summed.

    Args:
        num_rows: rows of the table.
        distinct: `take` sums the gradients of equal rows.
    """

    def __init__(self, num_rows: int, distinct: bool = True) -> None:
        self._num_rows, self._distinct = num_rows, distinct
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Keep gradients (n, D) of rows (n,); numbers that are not finite count as 0."""
        self._kept.append((rows, without_non_finite(gradients)))
        if len(self._kept) > 1 and len(self) > self._num_rows:
            self._kept = [self._sums()]

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (m,) and gradients (m, D), and forget them.

        They are the pairs as they came or, if `distinct`, what `sum_duplicates` makes of them.
        """
        return self._sums() if self._distinct else self._pairs()

    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        kept, self._kept = self._kept, []
        if len(kept) == 1:
            return kept[0]
        rows, gradients = (torch.cat(column) for column in zip(*kept, strict=True))
        return rows, gradients

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, sums = sum_duplicates(*self._pairs())
        return rows[: self._num_rows], sums[: self._num_rows]  # there are no more distinct rows

    def __len__(self) -> int:
        """The number of pairs kept."""
        return sum(len(rows) for rows, _ in self._kept)


class SlottedRowGradients:
    """Keeps one sum for each distinct row, on the CPU; slots are numbered as rows first appear.

    A slot number of four bytes for each row of the table makes sorting unnecessary. The memory of
    the sums grows with the distinct rows, not with the ids, and is reused from step to step.

    Args:
        num_rows: rows of the table.
        dim: D.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        self._num_rows, self._dim, self._count = num_rows, dim, 0
        self._slot_of = np.empty(0, np.int32)
        self._rows = torch.empty(0, dtype=torch.int64)
        self._sums = torch.empty(0, dim)

    def add(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients (n, D) to the sums of rows (n,); numbers that are not finite count as 0."""
        if not len(self._slot_of):
            self._slot_of = np.full(self._num_rows, -1, np.int32)
        self._rows = _with_room(self._rows, self._count, self._count + len(rows))
        slots = torch.empty_like(rows)
        count = cpu_kernels.assign_slots(rows, self._slot_of, self._rows, self._count, slots)
        self._sums = _with_room(self._sums, self._count, count)
        self._sums[self._count : count] = 0
        self._count = count
        cpu_kernels.add_to_rows(self._sums, slots, gradients, 1.0)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distinct rows (m,) and their sums (m, D), valid until the next `add`."""
        rows, sums = self._rows[: self._count], self._sums[: self._count]
        self._slot_of[rows.numpy()] = -1
        self._count = 0
        return rows, sums

    def __len__(self) -> int:
        """The number of distinct rows kept."""
        return self._count


class DenseRowGradients:
    """Keeps a sum for every row of a small table that all ranks hold, to be summed over ranks.

    Args:
        weight: (R, D) of the table.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._sums, self._is_taken = torch.zeros_like(weight), False
        self._rows = torch.arange(len(weight), device=weight.device)

    def add(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients (n, D) to the sums of rows (n,); numbers that are not finite count as 0."""
        sums = self.sums()
        if sums.device.type == "cpu":
            cpu_kernels.add_to_rows(sums, rows, gradients, 1.0)
        else:
            sums.index_add_(0, rows, without_non_finite(gradients))

    def sums(self) -> torch.Tensor:
        """The sums (R, D) of this rank, which become those of all ranks in place."""
        if self._is_taken:
            self._sums.zero_()
            self._is_taken = False
        return self._sums

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all rows (R,) and their sums (R, D), valid until the next `add`."""
        self._is_taken = True
        return self._rows, self._sums

    def __len__(self) -> int:
        """The number of sums; none if they have been taken."""
        return 0 if self._is_taken else len(self._sums)


def _with_room(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    """The buffer or, if it is too short, a copy with room for a quarter more than needed."""
    if len(buffer) >= needed:
        return buffer
    longer = buffer.new_empty((needed + needed // 4, *buffer.shape[1:]))
    longer[:used] = buffer[:used]
    return longer


def make_row_gradients(
    weight: torch.Tensor, distinct: bool, is_shared: bool = False
) -> SlottedRowGradients | SortedRowGradients | DenseRowGradients:
    """An empty store for gradients of the rows of `weight`, of the kind that suits its device.

    Args:
        weight: (R, D) of the table.
        distinct: `take` must sum the gradients of equal rows; on the CPU it always does.
        is_shared: every rank holds the same rows.
    """
    if is_shared:
        return DenseRowGradients(weight)
    if weight.device.type == "cpu":
        return SlottedRowGradients(len(weight), weight.shape[1])
    return SortedRowGradients(len(weight), distinct)
