"""The layers of MLPs in 16 bits on a GPU: one node of the autograd graph, and few kernels.

A layer is one product with bias and ReLU in it. Backward, the ReLU and the bias's gradient are one
kernel, and the gradient of the weights is a product whose sums stay float32. The head, a last layer
of one output with a sigmoid, is one kernel in training: logit, probability, loss and all gradients
are float32.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from devices.execution import Execution
from devices.gpu import padded_width, product_in_float32, triton_kernels
from model import layer_operators
from model.layer_operators import Target
from model.mlp import MLP
from optim.flat_parameters import FlatParameters


@dataclass(frozen=True)
class _Layer:
    """A layer's parameters in 16 bits, and where their gradients go.

    Attributes:
        weight: (m, n) in 16 bits.
        bias: (m,) in 16 bits.
        weight_gradient: (m, n) float32.
        bias_gradient: (m,) float32.
        has_relu: else it is a last layer with a sigmoid.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor
    has_relu: bool


class LowerLayers:
    """The layers of an MLP.

    Args:
        mlp: whose parameters they are.
        flat: has the parameters, from number `first` on.
        first: the number of the first weight.
        triton: kernels in Triton; else operators.

    Attributes:
        layers: in their order.
        flat: as given.
        has_head: the last layer has one output and a sigmoid.
    """

    def __init__(self, mlp: MLP, flat: FlatParameters, first: int, triton: bool) -> None:
        self.flat, names = flat, mlp.activations
        self.layers = [
            _Layer(
                flat.lowered_of(number),
                flat.lowered_of(number + 1),
                flat.gradient_of(number),
                flat.gradient_of(number + 1),
                name == "ReLU",
            )
            for number, name in zip(itertools.count(first, 2), names, strict=False)
        ]
        self.head_weight, self.head_bias = mlp.in_order[-2:]
        self.has_head = names[-1] == "Sigmoid" and len(self.head_bias) == 1
        self._functions = self._head = triton_kernels("layers") if triton else layer_operators
        if not (triton and self.has_head and self._head.head_fits(self.head_weight.shape[1])):
            self._head = layer_operators
        self._update_written = -1  # the update that the gradients of the weights are for

    def __call__(self, inputs: torch.Tensor, is_fast: bool = False) -> torch.Tensor:
        """(B, n) or wider, with zeros after the n columns -> (B, last width).

        Args:
            inputs: those of the first layer.
            is_fast: nan may become 0 on the way, as in `with_loss`.
        """
        arguments = self._as_wanted(inputs), self, self.head_bias, is_fast
        outputs: torch.Tensor = _Layers.apply(*arguments)
        return outputs

    def with_loss(self, inputs: torch.Tensor, target: Target) -> torch.Tensor:
        """The sum of the loss () over rows; its backward pass needs no gradient to begin with.

        Only where there is a head. The forward pass adds the gradients of the head to those of the
        parameters: an update has to follow. It may hide what is not finite: a ReLU in a product
        may turn nan into 0. If nan gets into a parameter so, FlatParameters.broken tells.

        Args:
            inputs: (B, n) or wider, with zeros after the n columns.
            target: what the probabilities are to be.
        """
        arguments = self._as_wanted(inputs), self, self.head_bias, target
        loss: torch.Tensor = _LayersWithLoss.apply(*arguments)
        return loss

    def _as_wanted(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs in 16 bits, filled up with zeros."""
        self.flat.refresh()
        missing = self.layers[0].weight.shape[1] - inputs.shape[1]
        inputs = F.pad(inputs, (0, missing)) if missing else inputs
        return inputs.to(self.flat.lowered.dtype)

    def hidden(self, inputs: torch.Tensor, is_fast: bool) -> list[torch.Tensor]:
        """The inputs of each layer, and the output of the last one with a ReLU.

        Args:
            inputs: those of the first layer.
            is_fast: the ReLU is part of the product, which may turn nan into 0.
        """
        outputs, product = [inputs], torch._addmm_activation if is_fast else torch.addmm
        for layer in self.layers:
            if layer.has_relu:
                found = product(layer.bias, outputs[-1], layer.weight.t())
                outputs.append(found if is_fast else found.relu_())
        return outputs

    def probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, k) -> (B, outputs) of a last layer with a sigmoid."""
        result: torch.Tensor = self._head.head(hidden, self._parameters_of_head())
        return result

    def loss(self, hidden: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, k) -> the sum of the loss (), and the gradient of `hidden`."""
        found: tuple[torch.Tensor, torch.Tensor] = self._head.head_with_loss(
            hidden, self._parameters_of_head(), target, self._gradients_of_head()
        )
        return found

    def through_sigmoid(
        self, gradient: torch.Tensor, hidden: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of `hidden` from that of the probabilities (B, outputs)."""
        gradient = torch.ops.aten.sigmoid_backward(gradient, outputs)
        gradients = self._gradients_of_head()
        return layer_operators.head_backward(gradient, hidden, self.head_weight, gradients)

    def _parameters_of_head(self) -> layer_operators.Parameters:
        """In float32: the head's numbers are few."""
        return self.head_weight.detach(), self.head_bias.detach()

    def _gradients_of_head(self) -> layer_operators.Gradients:
        """Where the gradients of its weight and bias, and of the bias before it, go."""
        last, width = self.layers[-1], self.head_weight.shape[1]
        before = self.layers[-2].bias_gradient if len(self.layers) > 1 else None
        return last.weight_gradient[:, :width], last.bias_gradient, before

    def back(
        self, gradient: torch.Tensor, outputs: Sequence[torch.Tensor], is_through: bool, wants: bool
    ) -> torch.Tensor | None:
        """Add the gradients of the layers that have ReLUs; returns that of their inputs.

        Args:
            gradient: that of the last one's output.
            outputs: what `hidden` has returned.
            is_through: the gradient is already that of the last one's product, with its bias done.
            wants: whether the gradient of the inputs is wanted.
        """
        adds = self._update_written == self.flat.num_updates  # after those of another chunk
        self._update_written = self.flat.num_updates
        is_own = is_through  # and so may be overwritten
        for k in reversed(range(len(outputs) - 1)):
            layer = self.layers[k]
            if not is_through:
                through = self._functions.relu_backward
                gradient = through(gradient, outputs[k + 1], layer.bias_gradient, is_own)
            out = torch.empty_like(layer.weight_gradient) if adds else layer.weight_gradient
            product_in_float32(gradient.t(), outputs[k], out)
            if adds:
                layer.weight_gradient.add_(out)
            if k == 0 and not wants:
                return None
            gradient = torch.mm(gradient, layer.weight)
            is_through, is_own = False, True
        return gradient


class _Layers(torch.autograd.Function):
    """An MLP whose gradients go to FlatParameters; `anchor` makes autograd call `backward`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layers: LowerLayers, anchor: torch.Tensor, is_fast: bool
    ) -> torch.Tensor:
        outputs = layers.hidden(inputs, is_fast)
        ctx.layers, has_relu = layers, layers.layers[-1].has_relu
        result = outputs[-1] if has_relu else layers.probabilities(outputs[-1])
        ctx.save_for_backward(*outputs, *([] if has_relu else [result]))
        return result

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None]:
        layers, outputs, wants = ctx.layers, ctx.saved_tensors, ctx.needs_input_grad[0]
        if layers.layers[-1].has_relu:
            return layers.back(gradient, outputs, False, wants), None, None, None
        gradient = layers.through_sigmoid(gradient, outputs[-2], outputs[-1])
        return layers.back(gradient, outputs[:-1], True, wants), None, None, None


class _LayersWithLoss(torch.autograd.Function):
    """The same with the loss, whose gradients the forward pass of the head has made."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layers: LowerLayers, anchor: torch.Tensor, target: Target
    ) -> torch.Tensor:
        outputs = layers.hidden(inputs, is_fast=True)
        loss, ctx.gradient = layers.loss(outputs[-1], target)
        ctx.layers = layers
        ctx.save_for_backward(*outputs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None]:
        wants = ctx.needs_input_grad[0]
        back = ctx.layers.back(ctx.gradient, ctx.saved_tensors, True, wants)
        return back, None, None, None


def flatten_if_lower(mlps: Sequence[MLP], execution: Execution) -> FlatParameters | None:
    """Make MLPs compute in 16 bits with flat parameters, where it is a GPU's or Triton's way.

    Args:
        mlps: all on one device.
        execution: how it is used.

    Returns:
        Their parameters in their order; None: they stay as they are.
    """
    on_gpu = mlps[0].in_order[0].device.type == "cuda"
    if execution.lower is None or not (on_gpu or execution.triton):
        return None
    return flatten(mlps, execution.lower, execution.triton)


def flatten(mlps: Sequence[MLP], lower: torch.dtype, triton: bool) -> FlatParameters:
    """Make MLPs compute with flat parameters, which are returned.

    Args:
        mlps: all on one device.
        lower: type of the products.
        triton: kernels in Triton; else operators.
    """
    parameters = [parameter for mlp in mlps for parameter in mlp.parameters()]
    first_weights = {id(mlp.in_order[0]) for mlp in mlps}
    pitches = [
        padded_width(p.shape[-1]) if id(p) in first_weights else p.shape[-1] for p in parameters
    ]
    flat = FlatParameters(parameters, pitches, lower)
    first = 0
    for mlp in mlps:
        mlp.lower_layers = LowerLayers(mlp, flat, first, triton)
        first += len(mlp.in_order)
    return flat
