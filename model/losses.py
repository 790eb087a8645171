"""Losses of the model, and their sums between two log lines."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from devices import cpu_kernels
from devices.gpu import triton_kernels

# predictions (b, 1), labels (b, 1), which rows count (1 or 0; None: all) ->
# the loss, summed over rows, and its gradient (b, 1)
Loss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]


def make_loss(
    kind: str, weights: Sequence[float], device: torch.device, triton: bool = False
) -> Loss:
    """The loss with its gradient; it does not ask whether these are finite.

    Args:
        kind: mse, bce (binary cross entropy) or wbce, where each label has a weight.
        weights: wbce: of label 0, of label 1; labels are cut to integers.
        device: where predictions are.
        triton: the entropies are one kernel.
    """
    if kind == "mse":
        return _squared_error
    of_label = torch.tensor(weights if kind == "wbce" else (1.0, 1.0), device=device)
    if triton:
        kernel = triton_kernels().cross_entropy
        return lambda predicted, label, counts: kernel(predicted, label, of_label, counts)
    entropy = _cross_entropy_on_cpu if device.type == "cpu" else _cross_entropy
    return lambda predicted, label, counts: entropy(predicted, label, of_label, counts)


def _squared_error(
    predicted: torch.Tensor, label: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    difference = predicted - label
    if counts is not None:
        difference = difference * counts
    return difference.square().sum(), 2 * difference


def _cross_entropy(
    predicted: torch.Tensor,
    label: torch.Tensor,
    of_label: torch.Tensor,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch's binary_cross_entropy, but nan gives nan: there it is an assertion in a kernel.

    After that a GPU is lost to the process. Logarithms are cut off at -100 and the gradient's
    denominator at 1e-12, as there.
    """
    weight = F.embedding(label.long().clamp_(0, 1).squeeze(1), of_label[:, None])
    if counts is not None:
        weight = weight * counts
    of_one = predicted.log().clamp_(min=-100)
    of_zero = predicted.neg().log1p_().clamp_(min=-100)
    loss = -(torch.lerp(of_zero, of_one, label) * weight).sum()
    variance = (1 - predicted).mul_(predicted).clamp_(min=1e-12)
    return loss, (predicted - label).div_(variance).mul_(weight)


def _cross_entropy_on_cpu(
    predicted: torch.Tensor,
    label: torch.Tensor,
    of_label: torch.Tensor,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one pass: a dozen operators on a few rows are a fortieth of a small step."""
    assert counts is None, "batches are not filled up on the CPU"
    gradient = torch.empty_like(predicted)
    loss = cpu_kernels.cross_entropy(predicted, label, of_label, gradient)
    return torch.tensor(loss), gradient
