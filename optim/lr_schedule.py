"""Learning rate of MLPerf's DLRM: linear warm-up, quadratic decay, then constant."""

import argparse
from dataclasses import dataclass

from common.errors import UserError

LOWEST_DECAYED_RATE = 1e-7


@dataclass(frozen=True)
class LearningRateSchedule:
    """The rate of every optimiser step.

    Args:
        base: the rate without warm-up and decay.
        num_warmup: the rate climbs in the steps before this one.
        decay_start: first step of the decay.
        num_decay: steps of the decay; 0: the rate does not decay.

    Raises:
        UserError: the decay starts before the warm-up ends.
    """

    base: float
    num_warmup: int = 0
    decay_start: int = 0
    num_decay: int = 0

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "LearningRateSchedule":
        """The schedule of --learning-rate and the --lr-* flags."""
        return cls(
            options.learning_rate,
            options.lr_num_warmup_steps,
            options.lr_decay_start_step,
            options.lr_num_decay_steps,
        )

    def __post_init__(self) -> None:
        if self.num_decay > 0 and self.decay_start < self.num_warmup:
            raise UserError(
                f"--lr-decay-start-step={self.decay_start} lies before the end of the warm-up"
                f" (--lr-num-warmup-steps={self.num_warmup}):"
                " warm-up must end before the decay starts"
            )

    def rate(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 1."""
        decay_end = self.decay_start + self.num_decay
        if step < self.num_warmup:
            return self.base * step / self.num_warmup
        if self.num_decay == 0:
            return self.base
        if step < self.decay_start:  # the original keeps the rate of the warm-up's last step
            last = self.num_warmup - 1
            return self.base * last / self.num_warmup if last > 0 else self.base
        left = decay_end - min(step, decay_end - 1)
        return max(LOWEST_DECAYED_RATE, self.base * (left / self.num_decay) ** 2)
