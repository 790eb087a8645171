"""How a training step's backward pass uses the gradients that it makes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from optim.loss_scale import NoScale
from optim.row_optimizers import Rate


@dataclass(frozen=True)
class Update:
    """The optimiser step that a backward pass is a part of.

    Attributes:
        lr: learning rate, a number or a tensor () on the device.
        rows_now: embedding rows are updated in this backward pass; else their gradients are kept
            for the pass that updates (accumulation over chunks or batches).
        dense_now: the MLPs' backward pass takes the SGD step too, so that no gradients exist.
        scale: that of the loss. If it is on, gradients of rows are kept until the end of the step,
            when it is known whether anything has overflowed.
        mean_over: rows of whose losses the gradients are the mean's.
        dense_is_ready: called in the backward pass when the gradients of all parameters that every
            rank has are there, before the rows of tables are updated; None: nobody wants to know.
    """

    lr: Rate
    rows_now: bool = True
    dense_now: bool = False
    scale: NoScale = field(default_factory=NoScale)
    mean_over: int = 1
    dense_is_ready: Callable[[], None] | None = None
