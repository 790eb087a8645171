"""Scaling of the loss for float16, whose smallest numbers are larger than many gradients.

Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2. The scale grows while
nothing overflows. A step in which something overflows changes nothing but the scale, which it cuts.
The scale stays on the device; torch's own GradScaler makes the host wait for it in each step.
"""

from collections.abc import Sequence

import torch

from devices.npu import OverflowFlag

FIRST_SCALE = 65536.0
LOWEST_SCALE, HIGHEST_SCALE = 1.0, 2.0**60  # no step could lead back from a scale of 0 or infinity
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale grows


class NoScale:
    """The scale of a loss that needs none: every method leaves its arguments as they are.

    A step calls `begin_forward`, `check_overflow`, `scale_gradient` and `check_overflow` for each
    chunk of its batch; then `unscale_`, `zero_if_overflown` and `end_step` for its update. If a
    batch may be skipped, `begin_batch` comes before its forward passes, and `drop_batch` instead of
    its backward passes if it is.
    """

    is_on = False

    def begin_batch(self) -> None:
        """Note what has overflowed so far in this step."""

    def drop_batch(self) -> None:
        """Forget what has overflowed since `begin_batch`."""

    def begin_forward(self) -> None:
        """Forget overflows of other work on the device."""

    def check_overflow(self) -> None:
        """Note an overflow in the forward or backward pass that has just ended."""

    def scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply the loss's gradient (b, 1), which a backward pass begins with, by the scale."""
        return gradient

    def factor(self) -> torch.Tensor | None:
        """(1,) what the loss's gradient is to be multiplied by, on the device; None: by nothing."""
        return None

    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide float32 gradients by the scale in place; note whether all are finite."""

    def overflow_counts(self) -> list[torch.Tensor]:
        """The tensors to be summed over ranks before `zero_if_overflown`, as gradients are."""
        return []

    def zero_if_overflown(self, gradients: Sequence[torch.Tensor]) -> None:
        """Fill the gradients with zeros, in place, if something in this step has overflowed."""

    def end_step(self) -> None:
        """Cut the scale or, after many steps without an overflow, let it grow."""

    def take_skipped(self) -> tuple[int, int, float]:
        """(steps skipped, steps, scale) since the last call; it may wait for the device."""
        return 0, 0, 1.0

    def take_warning(self) -> str:
        """A line about steps skipped since the last call, if they were the most; else empty."""
        skipped, steps, scale = self.take_skipped()
        if 2 * skipped <= steps:
            return ""
        return (
            f"warning: {skipped} of {steps} steps overflowed in float16 and changed nothing;"
            f" the loss scale is {scale:g}"
        )

    def state(self) -> list[float]:
        """The numbers that a resumed run needs; it may wait for the device."""
        return []

    def restore(self, state: Sequence[float]) -> None:
        """Continue from what `state` returned."""

    def exact_state(self) -> list[float]:
        """What `state` returns, and what `take_skipped` will return, which it does not take."""
        return []

    def restore_exact(self, state: Sequence[float]) -> None:
        """Continue from what `exact_state` returned."""


class LossScale(NoScale):
    """The scale of one model's loss.

    Args:
        device: where the gradients are.

    Attributes:
        scale: (1,) factor of the loss.
        steps: (1,) int32, steps since the scale last changed.
        overflows: (1,) above 0 if something has overflowed in this step.
    """

    is_on = True

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((1,), FIRST_SCALE, device=device)
        self.steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.overflows = torch.zeros(1, device=device)
        self._flag = OverflowFlag(device)
        self._inverse = self.scale.reciprocal()
        self._overflows_before = torch.zeros_like(self.overflows)
        self._num_skipped = torch.zeros_like(self.overflows)
        self._num_steps = torch.zeros_like(self.steps)

    def begin_batch(self) -> None:
        """Note what has overflowed in the step's batches before this one."""
        self._overflows_before.copy_(self.overflows)

    def drop_batch(self) -> None:
        """Forget what the batch has overflowed, so that it cannot spoil the step of the others."""
        self.overflows.copy_(self._overflows_before)

    def begin_forward(self) -> None:
        """Clear the chip's overflow flag."""
        self._flag.clear()

    def check_overflow(self) -> None:
        """Count an overflow if the chip's flag is set.

        The loss, computed between forward and backward pass, may set the flag without harm: the
        logarithm of a prediction of exactly 0 is infinite before it is cut off.
        """
        self._flag.add_to(self.overflows)

    def scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply the loss's gradient (b, 1) by the scale, in place, and clear the chip's flag."""
        gradient = gradient.mul_(self.scale)
        self._flag.clear()
        return gradient

    def factor(self) -> torch.Tensor:
        """(1,) the scale."""
        return self.scale

    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide float32 gradients by the scale in place; one that is not finite is an overflow."""
        for gradient in gradients:
            gradient.mul_(self._inverse)
            self.overflows.add_((~torch.isfinite(gradient)).any().float())

    def overflow_counts(self) -> list[torch.Tensor]:
        """[overflows]: what overflows on one rank spoils the step of all."""
        return [self.overflows]

    def zero_if_overflown(self, gradients: Sequence[torch.Tensor]) -> None:
        """Fill the gradients with zeros, in place, if any of this step's has overflowed."""
        has_overflown = self.overflows > 0
        for gradient in gradients:
            gradient.masked_fill_(has_overflown, 0.0)

    def end_step(self) -> None:
        """Cut the scale after an overflow, or let it grow after many steps without one.

        Plain operators do it: no document says whether torch_npu's kernel of _amp_update_scale_
        waits for the device.
        """
        has_overflown = self.overflows > 0
        self._num_skipped.add_(has_overflown)
        self._num_steps.add_(1)
        self.steps.add_(1).masked_fill_(has_overflown, 0)
        grows = self.steps >= GROWTH_INTERVAL
        self.scale.mul_(1 + (GROWTH - 1) * grows + (BACKOFF - 1) * has_overflown)
        self.scale.clamp_(LOWEST_SCALE, HIGHEST_SCALE)
        self.steps.masked_fill_(grows, 0)
        self._inverse.copy_(self.scale.reciprocal())
        self.overflows.zero_()

    def take_skipped(self) -> tuple[int, int, float]:
        """(steps skipped, steps, scale) since the last call; it waits for the device."""
        taken = int(self._num_skipped), int(self._num_steps), float(self.scale)
        self._num_skipped.zero_()
        self._num_steps.zero_()
        return taken

    def state(self) -> list[float]:
        """[scale, steps]; it waits for the device."""
        return [float(self.scale), float(self.steps)]

    def restore(self, state: Sequence[float]) -> None:
        """Continue from [scale, steps]; a file without a scale has [], which changes nothing."""
        if state:
            self.scale.fill_(state[0])
            self.steps.fill_(int(state[1]))
            self._inverse.copy_(self.scale.reciprocal())

    def exact_state(self) -> list[float]:
        """[scale, steps, and the two counts of `take_skipped`]; it waits for the device."""
        return [*self.state(), float(self._num_skipped), float(self._num_steps)]

    def restore_exact(self, state: Sequence[float]) -> None:
        """Continue from the four numbers of `exact_state`."""
        self.restore(state[:2])
        self._num_skipped.fill_(int(state[2]))
        self._num_steps.fill_(int(state[3]))


def make_loss_scale(dtype: torch.dtype | None, device: torch.device) -> NoScale:
    """The scale that a precision needs: float16's range is short, bfloat16's is float32's."""
    return LossScale(device) if dtype == torch.float16 else NoScale()
