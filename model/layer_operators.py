"""What MLPs in 16 bits do beside their products, by operators of any device.

devices/triton_layers.py has kernels with the same results, under the same names.
"""

from dataclasses import dataclass

import torch

from model.losses import cross_entropy

Parameters = tuple[torch.Tensor, torch.Tensor]  # weight (m, k) and bias (m,) of the head, float32
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Target:
    """What b probabilities are to be, and what the gradients of the loss are multiplied by.

    Attributes:
        label: (b, 1) float32.
        label_weights: (2,) weights of rows whose label, cut to an integer, is 0 or 1.
        mask: (b, 1) 1 for rows that count, 0 for padding; None: all rows count.
        divisor: gradients are of the loss divided by it.
        scale: (1,) factor of the gradients, on the device; None: 1.
        clamp: probabilities are cut to [clamp, 1 - clamp].
    """

    label: torch.Tensor
    label_weights: torch.Tensor
    mask: torch.Tensor | None = None
    divisor: float = 1.0
    scale: torch.Tensor | None = None
    clamp: float = 0.0


def relu_backward(
    gradient: torch.Tensor, output: torch.Tensor, bias_gradient: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """The gradient of a ReLU's input, where its output is above 0, and its sum over rows.

    Args:
        gradient: (b, m) that of the output.
        output: (b, m) of the same type.
        bias_gradient: (m,) float32, to which the sums over rows are added.
        in_place: whether the result may overwrite `gradient`.
    """
    kept = torch.ops.aten.threshold_backward(gradient, output, 0)
    bias_gradient.add_(kept.sum(0, dtype=torch.float32))
    return gradient.copy_(kept) if in_place else kept


def head(hidden: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """Probabilities (b, m) float32 of a last layer.

    Args:
        hidden: (b, k) in 16 bits, or more columns, of zeros.
        parameters: those of the layer.
    """
    weight, bias = parameters
    inputs = hidden[:, : weight.shape[1]].float()
    return torch.addmm(bias, inputs, weight.t()).sigmoid_()


def head_with_loss(
    hidden: torch.Tensor, parameters: Parameters, target: Target, gradients: Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer of one output, sigmoid, cross entropy, and the gradients of all of them.

    Args:
        hidden: (b, k) in 16 bits, or more columns, of zeros.
        parameters: those of the layer, which has one output.
        target: what is to be predicted.
        gradients: those of weight (1, k), bias (1,) and of the biases of the layer before (k,), all
            float32, to which sums over rows are added. The last is None if `hidden` is not the
            output of a ReLU.

    Returns:
        The sum of the loss over rows (), float32, and the gradient of `hidden`'s shape and type,
        through the ReLU if there is one.
    """
    from_sigmoid = head(hidden, parameters)
    predicted = from_sigmoid.clamp(target.clamp, 1 - target.clamp)
    loss, gradient = cross_entropy(predicted, target.label, target.label_weights, target.mask)
    gradient *= (1.0 if target.scale is None else target.scale) / target.divisor
    is_cut = (from_sigmoid < target.clamp) | (from_sigmoid > 1 - target.clamp)
    gradient.masked_fill_(is_cut, 0.0)
    gradient = torch.ops.aten.sigmoid_backward(gradient, from_sigmoid)
    return loss, head_backward(gradient, hidden, parameters[0], gradients)


def head_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, gradients: Gradients
) -> torch.Tensor:
    """The gradient of the last layer's inputs, from that of its logits (b, m) float32.

    The other arguments are those of `head_with_loss`.
    """
    of_weight, of_bias, of_hidden = gradients
    width = weight.shape[1]
    inputs = hidden[:, :width].float()
    of_weight.add_(gradient.t() @ inputs)
    of_bias.add_(gradient.sum(0))
    of_inputs = gradient @ weight
    if of_hidden is not None:
        of_inputs = torch.ops.aten.threshold_backward(of_inputs, inputs, 0)
        of_hidden.add_(of_inputs.sum(0))
    result = torch.zeros_like(hidden)
    result[:, :width] = of_inputs
    return result
