"""Matrices that project vectors of d numbers to the D numbers of a table with mixed dimensions."""

from collections.abc import Sequence
from typing import Any

import torch

from common.phases import phase
from devices.execution import Execution
from model.part_matrix import PartMatrix, apply_or_keep
from optim.row_optimizers import ELEMENT_OPTIMIZERS
from optim.update import Update
from ranks.placement import Part


class _Project(torch.autograd.Function):
    """Vectors times their table's matrix; the backward pass updates the matrices in place.

    They are updated where the rows of tables are if there is one rank. Several ranks each have all
    projections and project the vectors of their own rows, which are shorter than what comes of
    them; then the gradients are kept until they are summed over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: torch.Tensor, projections: "Projections", update: Update | None
    ) -> torch.Tensor:
        matrices = projections.matrices(vectors.dtype)
        by_table = vectors.transpose(0, 1)
        ctx.save_for_backward(by_table)
        ctx.projections, ctx.matrices, ctx.update = projections, matrices, update
        return torch.bmm(by_table, matrices.transpose(1, 2)).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        assert ctx.update is not None, "a forward pass without an update has no backward pass"
        (vectors,) = ctx.saved_tensors
        by_table = gradient.transpose(0, 1)
        vector_gradients = torch.bmm(by_table, ctx.matrices)  # before the matrices change
        matrix_gradients = torch.bmm(by_table.transpose(1, 2), vectors)
        with phase("update"):
            ctx.projections.update_matrices(matrix_gradients, ctx.update)
        return vector_gradients.transpose(0, 1), None, None


class Projections(PartMatrix):
    """The projections (D, d) of P tables of one dimension d, one below the other.

    They are trained by the optimiser of dense parameters, whose rule is that of rows with state of
    one number for each element.

    Args:
        parts: the P parts, in the order of the vectors that are projected.
        device: where they are.
        optimizer: sgd, adagrad or rwsadagrad.
        execution: how the device is used; the products are in its lower precision.
    """

    def __init__(
        self, parts: Sequence[Part], device: torch.device, optimizer: str, execution: Execution
    ) -> None:
        def make_optimizer(weight: torch.Tensor) -> Any:
            rule = ELEMENT_OPTIMIZERS[optimizer]
            return rule(weight, execution.triton, parts[0].is_shared)

        super().__init__(parts, device, make_optimizer)
        self._rows = torch.arange(len(self.weight), device=device)

    def project(self, vectors: torch.Tensor, update: Update | None) -> torch.Tensor:
        """(B, P, d) vectors, a column for each table -> (B, P, D).

        Args:
            vectors: float32, or of a lower precision, in which the product is made.
            update: what the backward pass does with the gradients; None: there is no such pass.
        """
        projected: torch.Tensor = _Project.apply(vectors, self, update)
        return projected

    def matrices(self, dtype: torch.dtype) -> torch.Tensor:
        """The projections as (P, D, d) of that type."""
        return self.weight.view(len(self.parts), -1, self.dim).to(dtype)

    def update_matrices(self, gradients: torch.Tensor, update: Update) -> None:
        """Apply the gradients (P, D, d) of the projections, or keep them, as `update` says."""
        of_rows = gradients.reshape(-1, self.dim).float()
        apply_or_keep(self.optimizer, self._rows, of_rows, update)
