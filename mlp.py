"""A multilayer perceptron: torch's modules, and on the CPU one hand-written pass each way."""

import itertools
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

NARROW = 64  # products with a side shorter than this gain nothing from oneDNN

# oneDNN does these products a tenth faster than torch's default, MKL, where that was measured. The
# operator is the one that torch.compile emits; a torch without it does without.
_linear: Any = None
if platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
    _linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them and `last` at the end.

    Weights are normal(0, sqrt(2/(m+n))) for n inputs and m outputs (Glorot and Bengio, 2010),
    biases normal(0, sqrt(1/m)), drawn from numpy's global generator layer by layer.

    Args:
        widths: of the inputs and of each layer.
        last: nn.ReLU() or nn.Sigmoid().
        device: where it computes.
    """

    def __init__(self, widths: Sequence[int], last: nn.Module, device: torch.device) -> None:
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(widths):
            linear = nn.Linear(n, m)
            weight = np.random.normal(0.0, np.sqrt(2 / (m + n)), size=(m, n)).astype(np.float32)
            bias = np.random.normal(0.0, np.sqrt(1 / m), size=m).astype(np.float32)
            linear.weight.data = torch.from_numpy(weight)
            linear.bias.data = torch.from_numpy(bias)
            layers += [linear, nn.ReLU()]
        layers[-1] = last
        super().__init__(*layers)
        self.to(device)
        self._on_cpu = device.type == "cpu"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, first width) -> (B, last width)."""
        if not self._on_cpu:
            outputs: torch.Tensor = super().forward(inputs)
            return outputs
        linears, activations = list(self)[::2], list(self)[1::2]
        names = [type(activation).__name__ for activation in activations]
        parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
        return _Layers.apply(inputs, names, *parameters)


class _Layers(torch.autograd.Function):
    """All layers in one node of the autograd graph.

    Activations are computed in place, so a layer keeps one tensor where torch's modules keep two,
    and gradients of weights are added to `.grad` by the product that makes them, so pieces of a
    batch need no sum of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, names: Sequence[str], *parameters: nn.Parameter
    ) -> torch.Tensor:
        outputs = [inputs]
        for k, name in enumerate(names):
            weight, bias = parameters[2 * k : 2 * k + 2]
            outputs.append(_layer(outputs[-1], weight, bias, name))
        ctx.save_for_backward(*outputs)
        ctx.names, ctx.parameters = names, parameters
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        outputs = ctx.saved_tensors
        for k in reversed(range(len(ctx.names))):
            weight, bias = ctx.parameters[2 * k : 2 * k + 2]
            gradient = _through_activation(gradient, outputs[k + 1], ctx.names[k])
            _add_weight_gradient(weight, gradient, outputs[k])
            _add_gradient(bias, gradient.sum(0))
            if k > 0 or ctx.needs_input_grad[0]:
                gradient = _product(gradient, weight.detach().t())
        of_inputs = gradient if ctx.needs_input_grad[0] else None
        return of_inputs, *[None] * (1 + len(ctx.parameters))


def _layer(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: str
) -> torch.Tensor:
    """(B, n), (m, n), (m,) -> (B, m), activated."""
    if _linear is not None and name == "ReLU" and min(len(inputs), *weight.shape) >= NARROW:
        return _linear(inputs, weight, bias, "relu", [], "")
    outputs = torch.addmm(bias, inputs, weight.t())
    return outputs.relu_() if name == "ReLU" else outputs.sigmoid_()


def _product(left: torch.Tensor, right_transposed: torch.Tensor) -> torch.Tensor:
    """(B, m) times the transpose of (n, m)."""
    if _linear is not None and min(len(left), *right_transposed.shape) >= NARROW:
        return _linear(left, right_transposed, None, "none", [], "")
    return torch.mm(left, right_transposed.t())


def _through_activation(gradient: torch.Tensor, output: torch.Tensor, name: str) -> torch.Tensor:
    """The gradient of an activation's input, from that of its output and the output itself."""
    if name == "ReLU":
        return torch.ops.aten.threshold_backward(gradient, output, 0)  # type: ignore[no-any-return]
    return torch.ops.aten.sigmoid_backward(gradient, output)  # type: ignore[no-any-return]


def _add_weight_gradient(
    weight: nn.Parameter, gradient: torch.Tensor, inputs: torch.Tensor
) -> None:
    """weight.grad += gradient' inputs."""
    if weight.shape[1] < NARROW:  # MKL is twice as fast the other way round
        _add_gradient(weight, torch.mm(inputs.t(), gradient).t().contiguous())
    elif weight.grad is None:
        weight.grad = torch.mm(gradient.t(), inputs)
    else:
        weight.grad.addmm_(gradient.t(), inputs)


def _add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
