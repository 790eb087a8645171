"""What a training step's backward pass does with the gradients that it makes."""

from dataclasses import dataclass, field

from optim.loss_scale import NoScale
from optim.row_optimizers import Rate


@dataclass(frozen=True)
class Update:
    """What a backward pass has to know of the optimiser step that it is a part of.

    Attributes:
        lr: learning rate, a number or one on the device.
        rows_now: embedding rows are updated in this backward pass; else their gradients are kept
            for the one that updates (accumulation over pieces or batches).
        dense_now: the MLPs' backward pass takes the SGD step too, so that no gradients exist.
        scale: of the loss. Where it is on, gradients of rows are kept until the end of the backward
            pass, which alone knows whether the step counts.
    """

    lr: Rate
    rows_now: bool = True
    dense_now: bool = False
    scale: NoScale = field(default_factory=NoScale)
