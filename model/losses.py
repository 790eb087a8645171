"""Losses of a batch's predictions, each with its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from devices import cpu_kernels
from devices.gpu import triton_kernels

# (predictions (b, 1), labels (b, 1), a mask (b, 1) of 1 for rows that count and 0 for padding, or
# None if all rows count) -> (the loss, summed over rows, and its gradient (b, 1))
Loss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]


def make_loss(
    kind: str, weights: Sequence[float], device: torch.device, triton: bool = False
) -> Loss:
    """The function that returns the loss and its gradient; neither is tested for being finite.

    Args:
        kind: mse, bce (binary cross entropy) or wbce (the same with a weight for each label).
        weights: those of rows whose label, cut to an integer, is 0 or 1; for wbce only.
        device: where the predictions are.
        triton: one kernel computes the cross entropies.
    """
    if kind == "mse":
        return _squared_error
    label_weights = torch.tensor(weights if kind == "wbce" else (1.0, 1.0), device=device)
    if triton:
        entropy = triton_kernels("loss").cross_entropy
    else:
        entropy = _cross_entropy_on_cpu if device.type == "cpu" else cross_entropy
    return CrossEntropy(label_weights, entropy)


@dataclass(frozen=True)
class CrossEntropy:
    """A Loss, which a model's head may also compute itself.

    Attributes:
        label_weights: (2,) weights of rows whose label, cut to an integer, is 0 or 1.
        function: computes it from predictions, labels, these weights and a mask.
    """

    label_weights: torch.Tensor
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __call__(
        self, predicted: torch.Tensor, label: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, summed over rows, and its gradient (b, 1)."""
        return self.function(predicted, label, self.label_weights, mask)


def _squared_error(
    predicted: torch.Tensor, label: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    difference = predicted - label
    if mask is not None:
        difference = difference * mask
    return difference.square().sum(), 2 * difference


def cross_entropy(
    predicted: torch.Tensor,
    label: torch.Tensor,
    label_weights: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's binary_cross_entropy, summed, and its gradient (b, 1), by operators of any device.

    As in torch, logarithms are at least -100 and the gradient's denominator at least 1e-12. Unlike
    in torch, a prediction that is nan makes the loss nan: torch's kernel has an assertion, after
    which a GPU is lost to the process.

    Args:
        predicted: (b, 1) probabilities of label 1.
        label: (b, 1).
        label_weights: (2,) weights of rows whose label, cut to an integer, is 0 or 1.
        mask: (b, 1) 1 for rows that count, 0 for padding; None: all rows count.
    """
    weight = F.embedding(label.long().clamp_(0, 1).squeeze(1), label_weights[:, None])
    if mask is not None:
        weight = weight * mask
    log_one = predicted.log().clamp_(min=-100)
    log_zero = predicted.neg().log1p_().clamp_(min=-100)
    loss = -(torch.lerp(log_zero, log_one, label) * weight).sum()
    variance = (1 - predicted).mul_(predicted).clamp_(min=1e-12)
    return loss, (predicted - label).div_(variance).mul_(weight)


def _cross_entropy_on_cpu(
    predicted: torch.Tensor,
    label: torch.Tensor,
    label_weights: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy` in one pass: a dozen operators on few rows take 1/40 of a small step."""
    assert mask is None, "batches are not padded on the CPU"
    gradient = torch.empty_like(predicted)
    loss = cpu_kernels.cross_entropy(predicted, label, label_weights, gradient)
    return torch.tensor(loss), gradient
