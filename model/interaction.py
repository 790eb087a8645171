"""The dot interaction of DLRM (Naumov et al., arXiv 1906.00091, section 2.1), forward and back."""

from typing import Any

import torch
from torch import nn

from devices import cpu_kernels
from devices.gpu import triton_kernels
from ranks.model_shape import ModelShape


def num_pairs(num_vectors: int, itself: bool) -> int:
    """How many pairs of V vectors there are, with `itself` also pairs of a vector with itself."""
    return num_vectors * (num_vectors + 1 if itself else num_vectors - 1) // 2


class DotInteraction(nn.Module):
    """The first vector of each row, then the products of pairs of the row's vectors.

    Args:
        num_vectors: V = T + 1, vectors in a row.
        itself: a vector is also paired with itself.
        device: where it computes.
        triton: one kernel each way if it can hold a row; the result then has zeros after the
            pairs, up to a width that tensor cores take.

    Attributes:
        pairs: (P,) pair k is entry pairs[k] of the flattened (V, V) products.
        mirror: (V * V,) entry e of the products belongs to pair mirror[e].
        factor: (V, V) how often a pair's gradient counts in each entry.
    """

    def __init__(
        self, num_vectors: int, itself: bool, device: torch.device, triton: bool = False
    ) -> None:
        super().__init__()
        self.itself = itself
        self._triton = triton_kernels() if triton else None
        self._on_cpu = device.type == "cpu"
        self.pairs: torch.Tensor
        self.mirror: torch.Tensor
        self.factor: torch.Tensor
        row, column = torch.tril_indices(num_vectors, num_vectors, 0 if itself else -1)
        mirror = torch.zeros(num_vectors, num_vectors, dtype=torch.int64)
        mirror[row, column] = mirror[column, row] = torch.arange(len(row))
        # d(v.v) = 2 v dv; the diagonal counts nothing if no vector is paired with itself
        factor = torch.ones(num_vectors, num_vectors).fill_diagonal_(2.0 if itself else 0.0)
        self.register_buffer("pairs", row * num_vectors + column, persistent=False)
        self.register_buffer("mirror", mirror.view(-1), persistent=False)
        self.register_buffer("factor", factor, persistent=False)
        self.to(device)

    def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) and (B, T, D) -> (B, D + P), and with Triton zeros after the P pairs."""
        if self._triton and self._triton.dot_fits(pooled.shape[1] + 1, pooled.shape[2]):
            fused: torch.Tensor = _FusedDot.apply(dense, pooled, self._triton, self.itself)
            return fused
        joined: torch.Tensor = _Dot.apply(dense, pooled, self)
        return joined

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """(B, V, D) -> (B, D + P): the result of `forward`, which autograd does not see."""
        dim = vectors.shape[2]
        if self._takes_kernels(vectors):
            out = vectors.new_empty(len(vectors), dim + len(self.pairs))
            cpu_kernels.dot_products(vectors, self.itself, out)
            return out
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([vectors[:, 0], products.index_select(1, self.pairs)], dim=1)

    def gradients(
        self, gradient: torch.Tensor, vectors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `dense` and `pooled` from the gradient (B, D + P) of `forward`'s result.

        With Z = V V' and S the symmetric matrix of Z's gradients, V's gradient is S V: one batched
        product instead of the two that the derivatives of both factors of V V' take.
        """
        num_rows, num_vectors, dim = vectors.shape
        if self._takes_kernels(vectors):
            symmetric = vectors.new_empty(num_rows, num_vectors, num_vectors)
            cpu_kernels.mirror_pairs(gradient, dim, self.itself, symmetric)
        else:
            symmetric = gradient[:, dim:].index_select(1, self.mirror)
            symmetric = symmetric.view(-1, num_vectors, num_vectors).mul_(self.factor)
        dense_gradient = torch.bmm(symmetric[:, :1], vectors).squeeze(1).add_(gradient[:, :dim])
        return dense_gradient, torch.bmm(symmetric[:, 1:], vectors)

    def _takes_kernels(self, vectors: torch.Tensor) -> bool:
        return self._on_cpu and vectors.dtype == torch.float32


class _Dot(torch.autograd.Function):
    """DotInteraction's own forward and backward pass, with one batched product back."""

    @staticmethod
    def forward(
        ctx: Any, dense: torch.Tensor, pooled: torch.Tensor, module: DotInteraction
    ) -> torch.Tensor:
        vectors = torch.cat([dense.unsqueeze(1), pooled], dim=1)
        ctx.save_for_backward(vectors)
        ctx.module = module
        return module.products(vectors)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.module.gradients(gradient, *ctx.saved_tensors), None


class _FusedDot(torch.autograd.Function):
    """Both passes of the dot interaction, by one Triton kernel each."""

    @staticmethod
    def forward(
        ctx: Any, dense: torch.Tensor, pooled: torch.Tensor, kernels: Any, itself: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(dense, pooled)
        ctx.kernels, ctx.itself = kernels, itself
        joined: torch.Tensor = kernels.dot_forward(dense, pooled, itself)
        return joined

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        dense, pooled = ctx.saved_tensors
        return *ctx.kernels.dot_backward(gradient, dense, pooled, ctx.itself), None, None


class CatInteraction(nn.Module):
    """All vectors of a row, one after the other."""

    def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) and (B, T, D) -> (B, D + T * D)."""
        return torch.cat([dense, pooled.flatten(1)], dim=1)


def make_interaction(shape: ModelShape, device: torch.device, triton: bool) -> nn.Module:
    """The module that combines the bottom MLP's output with the T pooled vectors.

    Args:
        shape: the model's.
        device: where it computes.
        triton: one kernel does it each way.
    """
    if shape.interaction == "cat":
        return CatInteraction()
    return DotInteraction(len(shape.tables) + 1, shape.itself, device, triton)
