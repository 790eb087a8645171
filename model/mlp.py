"""A multilayer perceptron: torch's modules, and on the CPU one hand-written pass each way."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from devices.memory import out_of_memory_told
from devices.older_torch import onednn_linear

NARROW = 64  # oneDNN gains nothing in layers with fewer inputs or outputs than this
FEW_ROWS = 512  # and nothing in batches of fewer rows: it packs the weights anew each time


class MLP(nn.Sequential):
    """Linear layers with ReLU between them and `last` at the end.

    Weights are normal(0, sqrt(2/(m+n))) for n inputs and m outputs (Glorot and Bengio, 2010),
    biases normal(0, sqrt(1/m)), drawn from numpy's global generator layer by layer.

    Args:
        widths: number of inputs, then of outputs of each layer.
        last: nn.ReLU() or nn.Sigmoid().
        device: where it computes.
        lower: type of the products and of a ReLU's outputs; None: float32. Parameters and
            gradients stay float32, and so does a last layer with a Sigmoid: bfloat16 cannot tell
            0.997 from 1, and has steps of 1/64 between logits of 2 and 4. Products that are
            gradients of weights are rounded to it on their way, but not on a GPU.

    Attributes:
        activations: "ReLU" or "Sigmoid" of each layer.
        in_order: weight and bias of each layer.
        lower_layers: what computes in 16 bits on a GPU, or with Triton's interpreter
            (lower_mlp.py); None: this module does.

    Raises:
        RankError: there is no memory for the weights.
    """

    def __init__(
        self,
        widths: Sequence[int],
        last: nn.Module,
        device: torch.device,
        lower: torch.dtype | None = None,
    ) -> None:
        with _memory_for_layers(widths, device):
            super().__init__(*_make_layers(widths, last))
            self.to(device)
        assert type(last) in (nn.ReLU, nn.Sigmoid)
        self._num_inputs, self._lower = widths[0], lower
        self._in_one_node = device.type == "cpu" and lower is None
        self.activations = [type(activation).__name__ for activation in list(self)[1::2]]
        self.in_order = tuple(self.parameters())  # parameters() walks the modules on each call
        self.lower_layers: Any = None

    @property
    def computes_loss(self) -> bool:
        """Whether `lower_layers` can compute a cross entropy with the last layer."""
        return self.lower_layers is not None and bool(self.lower_layers.has_head)

    @property
    def wanted_type(self) -> torch.dtype | None:
        """The type of inputs that costs no conversion, with zeros after them; None: float32."""
        return None if self.lower_layers is None else self._lower

    def forward(
        self, inputs: torch.Tensor, sgd_lr: float | None = None, is_fast: bool = False
    ) -> torch.Tensor:
        """(B, n) -> (B, last width) for n inputs, or for more if the columns after them are zeros.

        Such zeros make n a multiple of 8, without which float16's products are slow.

        Args:
            inputs: those of the first layer.
            sgd_lr: a learning rate, for float32 on the CPU only: the backward pass takes the SGD
                step in the products that would make the gradients, which then never exist.
                None: it makes the gradients.
            is_fast: nan may become 0 on the way, where that is faster.
        """
        if self._in_one_node:
            return _AllLayers.apply(inputs[:, : self._num_inputs], self, sgd_lr, *self.in_order)
        if self.lower_layers is not None:
            in_16_bits: torch.Tensor = self.lower_layers(inputs, is_fast)
            return in_16_bits
        assert sgd_lr is None, "only the CPU updates in the backward pass"
        if self._lower is not None or inputs.shape[1] > self._num_inputs:
            return self._by_operators(inputs, self._lower or torch.float32)
        outputs: torch.Tensor = super().forward(inputs)
        return outputs

    def _by_operators(self, outputs: torch.Tensor, lower: torch.dtype) -> torch.Tensor:
        weights: list[torch.Tensor] = list(self.in_order[::2])
        weights[0] = _with_zeros(weights[0], outputs.shape[1] - weights[0].shape[1])
        for activation, weight, bias in zip(
            self.activations, weights, self.in_order[1::2], strict=True
        ):
            if activation == "ReLU":
                outputs = F.linear(outputs.to(lower), weight.to(lower), bias.to(lower)).relu()
            else:
                outputs = F.linear(outputs.float(), weight, bias).sigmoid()
        return outputs


def _make_layers(widths: Sequence[int], last: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        linear = nn.Linear(n, m)
        weight = np.random.normal(0.0, np.sqrt(2 / (m + n)), size=(m, n)).astype(np.float32)
        bias = np.random.normal(0.0, np.sqrt(1 / m), size=m).astype(np.float32)
        linear.weight.data = torch.from_numpy(weight)
        linear.bias.data = torch.from_numpy(bias)
        layers += [linear, nn.ReLU()]
    return [*layers[:-1], last]


def _memory_for_layers(
    widths: Sequence[int], device: torch.device
) -> contextlib.AbstractContextManager[None]:
    num_bytes = 4 * sum(n * m for n, m in itertools.pairwise(widths))
    joined = "-".join(str(width) for width in widths)
    what = f"an MLP of {joined} ({-(-num_bytes // 10**9)} GB of weights)"
    less = "smaller widths in --arch-mlp-bot or --arch-mlp-top"
    return out_of_memory_told(device, what, less, num_bytes)


def _with_zeros(matrix: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The matrix with `num_columns` more columns of zeros; F.pad copies even if there are none."""
    return F.pad(matrix, (0, num_columns)) if num_columns else matrix


class _AllLayers(torch.autograd.Function):
    """All layers in one node of the autograd graph.

    Activations are computed in place, so a layer keeps one tensor; torch's modules keep two.
    The product that makes a weight's gradient adds it to `.grad`, so the chunks of a batch need no
    sum of their own. The price is that autograd sees no gradients of parameters: neither hooks nor
    torch.autograd.grad find them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        mlp: MLP,
        sgd_lr: float | None,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        outputs = [inputs]
        layers = zip(mlp.activations, parameters[::2], parameters[1::2], strict=True)
        for activation, weight, bias in layers:
            outputs.append(linear_layer(outputs[-1], weight, bias, activation))
        ctx.save_for_backward(*outputs)
        ctx.activations, ctx.lr, ctx.parameters = mlp.activations, sgd_lr, parameters
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        outputs, activations, lr = ctx.saved_tensors, ctx.activations, ctx.lr
        for k in reversed(range(len(activations))):
            weight, bias = ctx.parameters[2 * k : 2 * k + 2]
            gradient = _through_activation(gradient, outputs[k + 1], activations[k])
            is_wanted = k > 0 or ctx.needs_input_grad[0]
            input_gradient = _product(gradient, weight.t()) if is_wanted else gradient
            if lr is None:
                _add_gradients(weight, bias, gradient, outputs[k])
            else:
                _add_product(weight, gradient, outputs[k], -lr)
                bias.add_(gradient.sum(0), alpha=-lr)
            gradient = input_gradient
        returned = gradient if ctx.needs_input_grad[0] else None
        return returned, *[None] * (2 + len(ctx.parameters))


def _gains_from_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    is_large = inputs.shape[0] >= FEW_ROWS and min(weight.shape) >= NARROW
    return onednn_linear is not None and is_large


def linear_layer(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str
) -> torch.Tensor:
    """(B, n), weight (m, n), bias (m,) -> (B, m), with the activation applied."""
    if _gains_from_onednn(inputs, weight):
        # oneDNN's own relu turns nan into 0, which would hide that a model diverges
        outputs: torch.Tensor = onednn_linear(inputs, weight, bias, "none", [], "")
    else:
        outputs = torch.addmm(bias, inputs, weight.t())
    return outputs.relu_() if activation == "ReLU" else outputs.sigmoid_()


def _product(left: torch.Tensor, right_transposed: torch.Tensor) -> torch.Tensor:
    """(B, m) times the transpose of (n, m) -> (B, n)."""
    if _gains_from_onednn(left, right_transposed):
        return onednn_linear(left, right_transposed, None, "none", [], "")
    return torch.mm(left, right_transposed.t())


_relu_backward = torch.ops.aten.threshold_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default


def _through_activation(
    gradient: torch.Tensor, output: torch.Tensor, activation: str
) -> torch.Tensor:
    """The gradient of an activation's input, from its output and the output's gradient."""
    if activation == "ReLU":
        return _relu_backward(gradient, output, 0)  # type: ignore[no-any-return]
    return _sigmoid_backward(gradient, output)  # type: ignore[no-any-return]


def _add_gradients(
    weight: nn.Parameter, bias: nn.Parameter, gradient: torch.Tensor, inputs: torch.Tensor
) -> None:
    """weight.grad += gradient' inputs, bias.grad += the sum of gradient's rows."""
    if weight.grad is None or bias.grad is None:
        weight.grad, bias.grad = torch.mm(gradient.t(), inputs), gradient.sum(0)
    else:
        _add_product(weight.grad, gradient, inputs, 1)
        bias.grad.add_(gradient.sum(0))


def _add_product(
    target: torch.Tensor, gradient: torch.Tensor, inputs: torch.Tensor, scale: float
) -> None:
    """Target (m, n) += scale * gradient' inputs, for gradient (B, m) and inputs (B, n)."""
    if inputs.shape[1] < NARROW:  # MKL is twice as fast the other way round
        target.add_(torch.mm(inputs.t(), gradient).t(), alpha=scale)
    else:
        target.addmm_(gradient.t(), inputs, alpha=scale)
