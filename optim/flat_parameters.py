"""The dense parameters of a model in 16 bits, in one buffer, and one update of all of them."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from devices.gpu import triton_kernels
from optim.dense import ADAGRAD_SETTINGS, SGD_SETTINGS, DenseOptimizer
from optim.row_optimizers import EPS, Rate

SPACING = 64  # numbers; a parameter's copy begins at a multiple of it: tensor cores want 16 bytes


class Buffers(NamedTuple):
    """The tensors of FlatParameters, which says what they are."""

    values: torch.Tensor
    gradients: torch.Tensor
    lowered: torch.Tensor
    places: torch.Tensor
    broken: torch.Tensor


class FlatParameters:
    """Parameters in one buffer, their gradients in another, and copies of 16 bits in a third.

    Rows of weights may be longer in the last two: tensor cores take rows of 16-bit numbers that
    begin at multiples of 16 bytes. What is added stays 0. The gradients are 0 before a step.

    Args:
        parameters: float32, on one device; their values move into the buffer.
        pitches: how many numbers a row of each weight has in the other buffers.
        lower: type of the copies.

    Attributes:
        parameters: as given.
        values: (p,) float32, all parameters in their order, and zeros up to a multiple of SPACING.
        gradients: (q,) float32.
        lowered: (q,) of type `lower`.
        places: (p,) int32, where each value is in the other two.
        broken: () 0, or nan if a parameter is not finite. A step adds it to its loss: the ReLU of
            a GPU's products may turn nan into 0.
        num_updates: how often FlatOptimizer has updated them.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], pitches: Sequence[int], lower: torch.dtype
    ) -> None:
        self.parameters, self._versions = list(parameters), [-1] * len(parameters)
        device = self.parameters[0].device
        spare = -sum(p.numel() for p in self.parameters) % SPACING
        values = [p.detach().reshape(-1) for p in self.parameters]
        self.values = torch.cat([*values, torch.zeros(spare, device=device)])
        views = self.views(self.values)
        places: list[torch.Tensor] = []
        self._shapes: list[tuple[int, torch.Size]] = []  # where each begins among places, and how
        end = 0
        for parameter, view, pitch in zip(self.parameters, views, pitches, strict=True):
            parameter.data = view
            shape = parameter.shape if parameter.dim() == 1 else torch.Size([len(parameter), pitch])
            row, column = torch.arange(len(parameter)), torch.arange(parameter[0].numel())
            places.append((end + row[:, None] * shape[1:].numel() + column).view(-1))
            self._shapes.append((end, shape))
            end += -(-shape.numel() // SPACING) * SPACING
        places.append(torch.arange(end, end + spare))
        end += SPACING
        self.places = torch.cat(places).int().to(device)
        self.gradients = torch.zeros(end, device=device)
        self.lowered = torch.zeros(end, dtype=lower, device=device)
        self.broken, self.num_updates = torch.zeros((), device=device), 0

    def views(self, of_values: torch.Tensor) -> list[torch.Tensor]:
        """The numbers (p,) of all values as tensors of the parameters' shapes."""
        ends = itertools.accumulate(p.numel() for p in self.parameters)
        return [
            of_values[end - p.numel() : end].view_as(p)
            for p, end in zip(self.parameters, ends, strict=True)
        ]

    def lowered_of(self, number: int) -> torch.Tensor:
        """The copy of a parameter: (m, pitch) of a weight, (m,) of a bias."""
        return self._view(self.lowered, number)

    def gradient_of(self, number: int) -> torch.Tensor:
        """The gradient of a parameter: (m, pitch) of a weight, (m,) of a bias."""
        return self._view(self.gradients, number)

    def buffers(self) -> Buffers:
        """What an update changes, and `places`."""
        return Buffers(self.values, self.gradients, self.lowered, self.places, self.broken)

    def _view(self, buffer: torch.Tensor, number: int) -> torch.Tensor:
        begin, shape = self._shapes[number]
        return buffer[begin : begin + shape.numel()].view(shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies anew if others than FlatOptimizer have written parameters since."""
        versions = [parameter._version for parameter in self.parameters]
        if versions != self._versions:
            lowered = self.values.to(self.lowered.dtype)
            self.lowered.index_copy_(0, self.places.long(), lowered)
            self.broken.copy_((self.values * 0).sum())
            self._versions = versions


class FlatOptimizer(DenseOptimizer):
    """SGD or Adagrad of FlatParameters, which follows `DenseOptimizer` or `DenseAdagrad`.

    Args:
        flat: the parameters.
        lr: learning rate until `lr` is set anew.
        is_adagrad: it is Adagrad.
        triton: one kernel does it; else operators.
    """

    def __init__(self, flat: FlatParameters, lr: float, is_adagrad: bool, triton: bool) -> None:
        super().__init__(flat.parameters, lr)
        self.settings: dict[str, Any] = ADAGRAD_SETTINGS if is_adagrad else SGD_SETTINGS
        self._flat = flat
        self._update = triton_kernels("layers").update_parameters if triton else update_parameters
        self._squares: torch.Tensor | None = None
        if is_adagrad:
            self._squares = torch.zeros_like(flat.values)
            self.state = [
                {"step": torch.zeros(()), "sum": view} for view in flat.views(self._squares)
            ]

    def gradients(self) -> list[torch.Tensor]:
        """All gradients, as one tensor."""
        return [self._flat.gradients]

    @torch.no_grad()
    def update(self, lr: Rate) -> None:
        """Update the parameters and their copies, and make the gradients 0."""
        self._flat.num_updates += 1
        self._update(self._flat.buffers(), self._squares, lr, EPS)
        if not isinstance(lr, torch.Tensor):
            self.count_step()


def update_parameters(buffers: Buffers, squares: torch.Tensor | None, lr: Rate, eps: float) -> None:
    """What the kernel of the same name in devices/triton_layers.py does, by operators.

    Args:
        buffers: those of the parameters; all but places are changed.
        squares: (p,) float32 Adagrad's sums of squares, changed; None: SGD.
        lr: learning rate, a number or () on the device.
        eps: Adagrad's.
    """
    values, gradients, lowered, places, broken = buffers
    step = gradients.index_select(0, places)
    if squares is not None:
        squares.addcmul_(step, step)
        step = step / (squares.sqrt() + eps)
    values.sub_(step * lr)
    lowered.index_copy_(0, places.long(), values.to(lowered.dtype))
    broken.add_((values * 0).sum())
    gradients.zero_()
