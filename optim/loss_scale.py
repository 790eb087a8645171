"""Scaling of the loss for float16, whose smallest numbers are larger than many gradients.

Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2. The scale grows while
nothing overflows and is cut back when something does; that step then changes nothing. All of it
stays on the device: torch's own GradScaler would have the host wait in each step.
"""

from collections.abc import Sequence

import torch

from devices.npu import OverflowFlag

FIRST = 65536.0
LOWEST, HIGHEST = 1.0, 2.0**60  # it never becomes 0 or infinite, from where no step leads back
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000  # steps without an overflow, then it grows


class NoScale:
    """Where nothing is scaled: the twin of LossScale that does nothing."""

    is_on = False

    def begin(self) -> None:
        """A forward pass begins."""

    def look(self) -> None:
        """A forward or a backward pass has ended."""

    def scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """What the backward pass begins with."""
        return gradient

    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Undo the scale, in place."""

    def over_ranks(self) -> list[torch.Tensor]:
        """What has to be summed over ranks with the gradients."""
        return []

    def zero_if_overflown(self, gradients: Sequence[torch.Tensor]) -> None:
        """Let this step change nothing, if something overflowed on any rank."""

    def end(self) -> None:
        """An update is done."""

    def skipped(self) -> tuple[int, int, float]:
        """(steps skipped, steps, scale) since the last call, which may wait for the device."""
        return 0, 0, 1.0

    def state(self) -> list[float]:
        """What a resumed run needs."""
        return []

    def restore(self, state: Sequence[float]) -> None:
        """What `state` gave."""


class LossScale(NoScale):
    """The scale of one model's loss.

    Args:
        device: where the gradients are.

    Attributes:
        scale: (1,) the loss is multiplied by it.
        steps: (1,) int32, since the scale last changed.
        found: (1,) above 0: something has overflowed in this step.
    """

    is_on = True

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((1,), FIRST, device=device)
        self.steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.found = torch.zeros(1, device=device)
        self._flag = OverflowFlag(device)
        self._inverse = self.scale.reciprocal()
        self._num_skipped = torch.zeros_like(self.found)
        self._num_steps = torch.zeros_like(self.steps)

    def begin(self) -> None:
        """Before a forward pass."""
        self._flag.clear()

    def look(self) -> None:
        """After a forward or a backward pass: a chip's flag would say so of the loss as well.

        The logarithm of a prediction of exactly 0 is infinite, before it is cut off.
        """
        self._flag.add_to(self.found)

    def scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """(b, 1) times the scale, from where the backward pass begins."""
        gradient = gradient.mul_(self.scale)
        self._flag.clear()
        return gradient

    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide float32 gradients by the scale in place; remember whether all are finite."""
        for gradient in gradients:
            gradient.mul_(self._inverse)
            self.found.add_((~torch.isfinite(gradient)).any().float())

    def over_ranks(self) -> list[torch.Tensor]:
        """[found], which any rank can have set."""
        return [self.found]

    def zero_if_overflown(self, gradients: Sequence[torch.Tensor]) -> None:
        """Fill them with zeros, in place, if something has overflowed."""
        overflown = self.found > 0
        for gradient in gradients:
            gradient.masked_fill_(overflown, 0.0)

    def end(self) -> None:
        """Cut the scale back or, after many good steps, let it grow.

        In plain operators: nothing documents that torch_npu's kernel of _amp_update_scale_ does
        not wait for the device.
        """
        overflown = self.found > 0
        self._num_skipped.add_(overflown)
        self._num_steps.add_(1)
        self.steps.add_(1).masked_fill_(overflown, 0)
        grows = self.steps >= GROWTH_INTERVAL
        self.scale.mul_(1 + (GROWTH - 1) * grows + (BACKOFF - 1) * overflown)
        self.scale.clamp_(LOWEST, HIGHEST)
        self.steps.masked_fill_(grows, 0)
        self._inverse.copy_(self.scale.reciprocal())
        self.found.zero_()

    def skipped(self) -> tuple[int, int, float]:
        """(steps skipped, steps, scale) since the last call; waits for the device."""
        found = int(self._num_skipped), int(self._num_steps), float(self.scale)
        self._num_skipped.zero_()
        self._num_steps.zero_()
        return found

    def state(self) -> list[float]:
        """[scale, steps]; waits for the device."""
        return [float(self.scale), float(self.steps)]

    def restore(self, state: Sequence[float]) -> None:
        """Take over [scale, steps]; nothing where a file has none."""
        if state:
            self.scale.fill_(state[0])
            self.steps.fill_(int(state[1]))
            self._inverse.copy_(self.scale.reciprocal())


def make_loss_scale(dtype: torch.dtype | None, device: torch.device) -> NoScale:
    """The scale that a lower precision needs: float16's numbers end early, bfloat16's do not."""
    return LossScale(device) if dtype == torch.float16 else NoScale()
