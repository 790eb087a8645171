"""Parts of one dimension, one below the other, and the optimiser that updates their rows."""

from collections.abc import Callable, Sequence

import torch

from devices.memory import out_of_memory_told
from optim.row_optimizers import RowOptimizer
from optim.update import Update
from ranks.placement import Part


class PartMatrix:
    """The parts of one dimension that this rank holds, in one matrix.

    Args:
        parts: the parts, one at least, in the order of their rows.
        device: where the matrix is.
        make_optimizer: makes the optimiser of the rows of (R, d).
        num_spare: rows of zeros at the matrix's end, which stay zeros.

    Attributes:
        parts: as given.
        dim: d.
        weight: (R, d) float32, R rows of all parts, and the spare ones.
        optimizer: updates `weight`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        device: torch.device,
        make_optimizer: Callable[[torch.Tensor], RowOptimizer],
        num_spare: int = 0,
    ) -> None:
        self.parts, self.dim, self._num_spare = tuple(parts), parts[0].matrix.dim, num_spare
        self._rows_of: dict[Part, slice] = {}
        num_rows = 0
        for part in parts:
            self._rows_of[part] = slice(num_rows, num_rows + part.num_rows)
            num_rows += part.num_rows
        self.weight = _zeros(num_rows + num_spare, self.dim, device)
        self.optimizer = make_optimizer(self.weight)

    def part_view(self, name: str, part: Part) -> torch.Tensor:
        """The rows of `row_tensors()[name]` that are the part's."""
        return self.row_tensors()[name][self._rows_of[part]]

    def row_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors with a row for each row of the matrix, by name.

        They are `weight` and the optimiser's state by its own names.
        """
        return {"weight": self.weight} | self.optimizer.state

    def apply_kept(self, update: Update) -> None:
        """Apply the gradients that are kept, if there are any, unless the step has overflowed."""
        self.optimizer.apply_kept(update.lr, update.scale)
        self._clear_spare()

    def shared_gradients(self) -> list[torch.Tensor]:
        """What has to be summed over ranks before `apply_kept`; nothing, if no part is shared."""
        return self.optimizer.shared_gradients()

    def _clear_spare(self) -> None:
        """Make the spare rows zeros again after an update."""
        if self._num_spare:
            self.weight[-self._num_spare :] = 0


def _zeros(num_rows: int, dim: int, device: torch.device) -> torch.Tensor:
    num_bytes = 4 * num_rows * dim
    what = f"{num_rows} rows of {dim} numbers ({1e-9 * num_bytes:.1f} GB of tables)"
    less = "more ranks, a lower --max-ind-range or a smaller --arch-sparse-feature-size"
    with out_of_memory_told(device, what, less, num_bytes):
        return torch.zeros(num_rows, dim, device=device)


def apply_or_keep(
    optimizer: RowOptimizer, rows: torch.Tensor, gradients: torch.Tensor, update: Update
) -> None:
    """Pass gradients (n, d) of rows (n,) to their optimiser, which applies or keeps them."""
    if update.scale.is_on:
        gradients = gradients.float()  # without their scale float16 would make some of them 0
        update.scale.unscale_([gradients])
        optimizer.keep(rows, gradients)
    elif update.rows_now and not optimizer.is_shared:
        optimizer.apply(rows, gradients, update.lr)
    else:
        optimizer.keep(rows, gradients)
