"""The rows of embedding tables that this rank holds, in one matrix that the backward pass updates.

The matrix knows neither tables nor ranks: embedding_tables.py says which parts of which tables it
is made of.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from common.phases import phase
from devices.execution import Execution
from devices.gpu import triton_kernels
from model.batch import Bags
from model.part_matrix import PartMatrix, apply_or_keep
from optim.row_optimizers import ELEMENT_OPTIMIZERS, TABLE_OPTIMIZERS, RowOptimizer
from optim.update import Update
from ranks.placement import Part


class _PooledLookup(torch.autograd.Function):
    """Pooled vectors of bags; the backward pass updates the matrix in place.

    That way no gradient of the matrix's size exists, and autograd sees no parameter. `anchor` is a
    tensor that wants a gradient: without one autograd would not call `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        matrix: "EmbeddingMatrix",
        bags: Bags,
        update: Update | None,
    ) -> torch.Tensor:
        ctx.matrix, ctx.bags, ctx.update = matrix, bags, update
        return matrix.pool_bags(bags)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        assert ctx.update is not None, "a forward pass without an update has no backward pass"
        with phase("update"):
            ctx.matrix.update_rows(ctx.bags, gradient, ctx.update)
        return None, None, None, None


class EmbeddingMatrix(PartMatrix):
    """Parts of one dimension d that are looked up by id: one lookup and one update serve all.

    Args:
        parts: the P parts of dimension d, one at least, one below the other.
        device: where the matrix is.
        optimizer: sgd, adagrad or rwsadagrad.
        learned_pooling: each row has a trained weight in the sum over its bag.
        execution: how the device is used; the matrix and its updates are float32 in any case.
        num_spare: rows of zeros at the matrix's end, which stay zeros.

    Attributes:
        pooling: (R, 1) float32 weights in sums over bags, or None.
        pooling_optimizer: updates `pooling`; None if that is None.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        device: torch.device,
        optimizer: str,
        learned_pooling: bool,
        execution: Execution,
        num_spare: int = 0,
    ) -> None:
        is_shared = parts[0].is_shared
        num_columns = len(parts) if execution.sums_equal_rows else 0

        def make_optimizer(weight: torch.Tensor) -> RowOptimizer:
            rule = TABLE_OPTIMIZERS[optimizer]
            return rule(weight, execution.triton, is_shared, num_columns)

        super().__init__(parts, device, make_optimizer, num_spare)
        self._execution, self._num_parts = execution, len(parts)
        self.pooling: torch.Tensor | None = None
        self.pooling_optimizer: RowOptimizer | None = None
        if learned_pooling:
            self.pooling = torch.ones(len(self.weight), 1, device=device)
            rule = ELEMENT_OPTIMIZERS[optimizer]
            self.pooling_optimizer = rule(self.pooling, execution.triton, is_shared)
        self._triton = triton_kernels("rows") if execution.triton else None
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def look_up(self, bags: Bags, update: Update | None) -> torch.Tensor:
        """Bags of rows of the matrix -> their pooled vectors (bags, d).

        Args:
            bags: without `one_lookup` those of B rows of P parts.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        pooled: torch.Tensor = _PooledLookup.apply(self._anchor, self, bags, update)
        return pooled

    def pool_bags(self, bags: Bags) -> torch.Tensor:
        """Bags of rows of the matrix -> the sums of their vectors (bags, d)."""
        weights = None if self.pooling is None else F.embedding(bags.ids, self.pooling)
        if bags.lengths is None:
            vectors = self._vectors(bags.ids)
            return vectors if weights is None else vectors * weights
        begins = bags.begins().view(-1)
        weights = None if weights is None else weights.view(-1)
        return F.embedding_bag(
            bags.ids, self.weight, begins, mode="sum", per_sample_weights=weights
        )

    def _vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """(n,) rows of the matrix -> their vectors (n, d)."""
        if self._triton and self._execution.one_lookup:
            lower = self._execution.lower or self.weight.dtype
            vectors: torch.Tensor = self._triton.look_up(self.weight, rows, lower)
            return vectors
        if self._execution.one_lookup:
            return F.embedding(rows, self.weight)
        columns = rows.view(-1, self._num_parts).unbind(1)
        by_part = [F.embedding(column, self.weight) for column in columns]
        return torch.stack(by_part, dim=1).view(-1, self.dim)

    def update_rows(self, bags: Bags, gradient: torch.Tensor, update: Update) -> None:
        """Apply the gradient of the pooled vectors (bags, D) to the rows in the bags, or keep it.

        Args:
            bags: bags whose ids are rows of the matrix.
            gradient: (bags, D) gradient of what `pool_bags` returned.
            update: says whether it is applied or kept.
        """
        row_gradients = gradient
        if bags.lengths is not None:
            lengths = bags.lengths.reshape(-1)
            # with one argument, torch_npu before 2.13 has no kernel for it
            bag_of_id = torch.repeat_interleave(
                torch.arange(len(lengths), device=lengths.device),
                lengths,
                output_size=len(bags.ids),
            )
            row_gradients = F.embedding(bag_of_id, gradient)
        if self.pooling is not None and self.pooling_optimizer is not None:
            vectors = F.embedding(bags.ids, self.weight)
            pooling_gradients = (row_gradients * vectors).sum(1, keepdim=True)
            row_gradients = row_gradients * F.embedding(bags.ids, self.pooling)
            apply_or_keep(self.pooling_optimizer, bags.ids, pooling_gradients, update)
        apply_or_keep(self.optimizer, bags.ids, row_gradients, update)
        self._clear_spare()

    def apply_kept(self, update: Update) -> None:
        """Apply the gradients that are kept, if there are any, unless the step has overflowed."""
        super().apply_kept(update)
        if self.pooling_optimizer is not None:
            self.pooling_optimizer.apply_kept(update.lr, update.scale)

    def shared_gradients(self) -> list[torch.Tensor]:
        """What has to be summed over ranks before `apply_kept`; nothing, if no part is shared."""
        found = super().shared_gradients()
        if self.pooling_optimizer is not None:
            found += self.pooling_optimizer.shared_gradients()
        return found

    def row_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors with a row for each row of the matrix, by name.

        They are those of every PartMatrix, `pooling` and the state of the pooling weights as
        `pooling.sum`.
        """
        found = super().row_tensors()
        if self.pooling is not None and self.pooling_optimizer is not None:
            found["pooling"] = self.pooling.view(-1)
            found |= {
                f"pooling.{name}": state.view(-1)
                for name, state in self.pooling_optimizer.state.items()
            }
        return found
