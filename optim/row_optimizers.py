"""Optimisers that change only the rows of a table that a batch touched.

A row's gradients are summed before the rule is applied. On the CPU numba's kernels do the work.
Other devices use operators whose shapes do not depend on the rows, so the host need not wait.
"""

import torch

from devices import cpu_kernels
from devices.gpu import triton_kernels
from optim.loss_scale import NoScale
from optim.row_gradients import DenseRowGradients, make_row_gradients, without_non_finite

EPS = 1e-10
Rate = float | torch.Tensor  # a tensor () on a GPU whose steps are recorded


class RowOptimizer:
    """Keeps and applies gradients of rows; a subclass has the rule.

    Args:
        weight: (R, D) float32, updated in place.
        triton: sgd is one Triton kernel.
        num_columns: ids at this distance are of one table, and the kernel sums the gradients of
            equal ones before it adds them to a row; 0: it adds each by itself.
        is_shared: every rank holds the same rows. Their gradients are kept, to be summed over
            ranks before `apply_kept`.

    Attributes:
        weight: as given.
        is_shared: as given.
        state: tensors with a row for each row of `weight` that the rule remembers, by name; they
            begin with zeros.
        is_linear: the rule may be applied to each gradient of a row in turn, without their sum.
    """

    is_linear = False

    def __init__(
        self,
        weight: torch.Tensor,
        triton: bool = False,
        is_shared: bool = False,
        num_columns: int = 0,
    ) -> None:
        self.weight, self.is_shared, self._num_columns = weight, is_shared, num_columns
        shapes = self.state_shapes(weight.shape[1])
        self.state = {name: weight.new_zeros(len(weight), *shape) for name, shape in shapes.items()}
        self._triton = triton_kernels("rows") if triton else None
        self._kept = make_row_gradients(weight, not self.is_linear, is_shared)
        self._on_cpu = weight.device.type == "cpu"

    @classmethod
    def state_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """The shape of a row of each tensor of the state, for rows of `dim` numbers, by name."""
        return {}

    def _subtract(self, rows: torch.Tensor, steps: torch.Tensor, lr: Rate) -> None:
        """weight[rows] -= lr * steps, by an operator."""
        if isinstance(lr, torch.Tensor):
            self.weight.index_add_(0, rows, steps * -lr)
        else:
            self.weight.index_add_(0, rows, steps, alpha=-lr)

    def keep(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Keep gradients (n, D) of rows (n,) for the next `apply`."""
        if len(rows):  # a rank whose tables are in no bag of the batch has none
            self._kept.add(rows, gradients.float())

    def apply(self, rows: torch.Tensor, gradients: torch.Tensor, lr: Rate) -> None:
        """Update `weight` with gradients (n, D) of rows (n,) and with all that were kept."""
        self._kept.add(rows, gradients.float())
        self._update(*self._kept.take(), lr)

    def apply_kept(self, lr: Rate, loss_scale: NoScale) -> None:
        """Update `weight` with the gradients kept, if any, unless the step has overflowed."""
        if len(self._kept):
            rows, sums = self._kept.take()
            loss_scale.zero_if_overflown([sums])
            self._update(rows, sums, lr)

    def shared_gradients(self) -> list[torch.Tensor]:
        """The tensors that have to be summed over ranks before `apply_kept`."""
        return [self._kept.sums()] if isinstance(self._kept, DenseRowGradients) else []

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        """Apply the rule to distinct rows (m,) and their sums (m, D).

        A row may be repeated with sums of 0 or, if the rule is linear, with any gradients.
        """
        raise NotImplementedError


class RowSGD(RowOptimizer):
    """row -= lr * gradient."""

    is_linear = True

    def apply(self, rows: torch.Tensor, gradients: torch.Tensor, lr: Rate) -> None:
        """Update `weight` without summing equal rows if nothing is kept: the rule is linear."""
        if len(self._kept):
            super().apply(rows, gradients, lr)
        elif self._triton:
            self._triton.sgd(self.weight, rows, gradients, lr, self._num_columns)
        elif self._on_cpu:
            cpu_kernels.add_to_rows(self.weight, rows, gradients, -float(lr))
        else:
            self._subtract(rows, without_non_finite(gradients), lr)

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        if self._triton:
            self._triton.sgd(self.weight, rows, sums, lr, self._num_columns)
        elif self._on_cpu:
            cpu_kernels.sgd(self.weight, rows, sums, float(lr))
        else:
            self._subtract(rows, sums, lr)


class RowAdagrad(RowOptimizer):
    """torch.optim.Adagrad's rule for sparse gradients: one accumulator for each element.

    Duchi et al., 2011.
    """

    @classmethod
    def state_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """Sums of squares, one for each number."""
        return {"sum": (dim,)}

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        total = self.state["sum"]
        if self._on_cpu:
            cpu_kernels.adagrad((self.weight, total), rows, sums, float(lr), EPS)
        else:
            total.index_add_(0, rows, sums.square())
            self._subtract(rows, sums / (total[rows].sqrt() + EPS), lr)


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator for each row: the mean of the squared gradient, as in FBGEMM."""

    @classmethod
    def state_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """Sums of mean squares, one for each row."""
        return {"momentum": ()}

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        total = self.state["momentum"]
        if self._on_cpu:
            cpu_kernels.row_wise_adagrad((self.weight, total), rows, sums, float(lr), EPS)
        else:
            total.index_add_(0, rows, sums.square().mean(1))
            self._subtract(rows, sums / (total[rows].sqrt() + EPS)[:, None], lr)


TABLE_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "rwsadagrad": RowWiseAdagrad,
}
# These update pooling weights and projections, which are dense parameters for --optimizer: rules
# and names of the state are those of optim/dense.py.
ELEMENT_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "rwsadagrad": RowAdagrad,
}
