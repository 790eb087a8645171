"""Optimisers that change only the rows of a table that a batch touched.

A row's gradients are summed before the rule is applied. On the CPU numba's kernels do the work,
elsewhere operators whose shapes do not depend on the values and that no host waits for.
"""

from collections.abc import Callable

import torch

from devices import cpu_kernels
from devices.gpu import triton_kernels
from optim.loss_scale import NoScale
from optim.row_gradients import row_gradients, without_non_finite

EPS = 1e-10
Rate = float | torch.Tensor  # on a GPU whose steps are recorded it is a number on the device


class RowOptimizer:
    """What the rules share.

    Args:
        weight: (R, D).
        triton: sgd is one kernel.

    Attributes:
        weight: as given.
        state: what the rule remembers of each row, by name.
        is_linear: a row's gradients need not be summed before the rule is applied.
    """

    is_linear = False

    def __init__(self, weight: torch.Tensor, triton: bool = False) -> None:
        self.weight = weight
        self.state: dict[str, torch.Tensor] = {}
        self._triton = triton_kernels() if triton else None
        self._kept = row_gradients(weight, distinct=not self.is_linear)
        self._on_cpu = weight.device.type == "cpu"

    def _subtract(self, rows: torch.Tensor, steps: torch.Tensor, lr: Rate) -> None:
        """weight[rows] -= lr * steps, by an operator."""
        if isinstance(lr, torch.Tensor):
            self.weight.index_add_(0, rows, steps * -lr)
        else:
            self.weight.index_add_(0, rows, steps, alpha=-lr)

    def keep(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Keep gradients (n, D) of rows (n,) for the next `apply`."""
        if len(rows):  # none on a rank without tables
            self._kept.add(rows, gradients.float())

    def apply(self, rows: torch.Tensor, gradients: torch.Tensor, lr: Rate) -> None:
        """Update `weight` with gradients (n, D) of rows (n,) and with those kept."""
        self._kept.add(rows, gradients.float())
        self._update(*self._kept.take(), lr)

    def apply_kept(self, lr: Rate, loss_scale: NoScale) -> None:
        """Update `weight` with what is kept, unless the step has overflowed."""
        if len(self._kept):
            rows, sums = self._kept.take()
            loss_scale.zero_if_overflown([sums])
            self._update(rows, sums, lr)

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        """The rule for distinct rows (m,); rows may come again with sums (m, D) of zero.

        A linear rule takes rows that come again with gradients of their own too.
        """
        raise NotImplementedError


class RowSGD(RowOptimizer):
    """row -= lr * gradient."""

    is_linear = True

    def apply(self, rows: torch.Tensor, gradients: torch.Tensor, lr: Rate) -> None:
        """As RowOptimizer.apply; where nothing is kept sums are spared, as the rule is linear."""
        if len(self._kept):
            super().apply(rows, gradients, lr)
        elif self._triton:
            self._triton.sgd(self.weight, rows, gradients, lr)
        elif self._on_cpu:
            cpu_kernels.add_to_rows(self.weight, rows, gradients, -float(lr))
        else:
            self._subtract(rows, without_non_finite(gradients), lr)

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        if self._on_cpu:
            cpu_kernels.sgd(self.weight, rows, sums, float(lr))
        else:
            self._subtract(rows, sums, lr)


class RowAdagrad(RowOptimizer):
    """torch.optim.Adagrad's rule for sparse gradients: one accumulator an element.

    Duchi et al., 2011.
    """

    def __init__(self, weight: torch.Tensor, triton: bool = False) -> None:
        super().__init__(weight, triton)
        self.state["sum"] = torch.zeros_like(weight)

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        total = self.state["sum"]
        if self._on_cpu:
            cpu_kernels.adagrad((self.weight, total), rows, sums, float(lr), EPS)
        else:
            total.index_add_(0, rows, sums.square())
            self._subtract(rows, sums / (total[rows].sqrt() + EPS), lr)


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: the mean of the squared gradient (as FBGEMM has it)."""

    def __init__(self, weight: torch.Tensor, triton: bool = False) -> None:
        super().__init__(weight, triton)
        self.state["momentum"] = weight.new_zeros(len(weight))

    def _update(self, rows: torch.Tensor, sums: torch.Tensor, lr: Rate) -> None:
        total = self.state["momentum"]
        if self._on_cpu:
            cpu_kernels.row_wise_adagrad((self.weight, total), rows, sums, float(lr), EPS)
        else:
            total.index_add_(0, rows, sums.square().mean(1))
            self._subtract(rows, sums / (total[rows].sqrt() + EPS)[:, None], lr)


TABLE_OPTIMIZERS: dict[str, Callable[[torch.Tensor, bool], RowOptimizer]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "rwsadagrad": RowWiseAdagrad,
}
POOLING_OPTIMIZERS: dict[str, Callable[[torch.Tensor, bool], RowOptimizer]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    # rows of one number: the same rule, under the dense parameters' name of its state
    "rwsadagrad": RowAdagrad,
}
