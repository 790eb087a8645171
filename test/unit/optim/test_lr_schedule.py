"""The learning rate of every step, against the contract's sentences."""

import pytest
from conftest import train

from common.errors import UserError
from optim.lr_schedule import LearningRateSchedule


def rates(schedule, steps):
    return [round(schedule.rate(step), 9) for step in range(1, steps + 1)]


def test_constant_without_warm_up_and_decay():
    assert rates(LearningRateSchedule(0.5), 3) == [0.5, 0.5, 0.5]


def test_warm_up_then_base():
    assert rates(LearningRateSchedule(1.0, num_warmup=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_warm_up_plateau_decay_then_constant():
    schedule = LearningRateSchedule(1.0, num_warmup=4, decay_start=6, num_decay=4)
    plateau = 0.75
    want = [0.25, 0.5, 0.75, plateau, plateau, 1, 0.5625, 0.25, 0.0625, 0.0625, 0.0625]
    assert rates(schedule, 11) == want


def test_decay_never_falls_below_the_lowest_rate():
    assert LearningRateSchedule(1e-6, decay_start=0, num_decay=100).rate(99) == 1e-7


@pytest.mark.parametrize("num_warmup", [0, 1])
def test_base_rate_before_the_decay_where_no_warm_up_set_another(num_warmup):
    assert LearningRateSchedule(0.3, num_warmup, decay_start=5, num_decay=2).rate(2) == 0.3


def test_warm_up_must_end_before_the_decay_if_there_is_one():
    with pytest.raises(UserError, match="warm-up must end"):
        LearningRateSchedule(1.0, num_warmup=5, decay_start=4, num_decay=1)
    LearningRateSchedule(1.0, num_warmup=5, decay_start=4, num_decay=0)
    flags = ["--lr-num-warmup-steps=5", "--lr-decay-start-step=4", "--lr-num-decay-steps=1"]
    assert train(*flags).status == 2
