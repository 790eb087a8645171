"""Losses stay on the device until they are printed: one read a line, none a step."""

import pytest
import torch

from common.errors import UserError
from engine import loss_meter
from engine.loss_meter import LOSSES_ON_DEVICE, LossMeter
from ranks.process import Process

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")


@pytest.fixture
def reads(monkeypatch):
    """How many losses each read has summed over ranks."""
    sizes = []
    monkeypatch.setattr(
        loss_meter, "sum_over_ranks", lambda process, tensors: sizes.append(len(tensors[0]))
    )
    return sizes


def test_losses_are_read_once_a_line(reads):
    meter = LossMeter(ALONE)
    for it in range(1, 11):
        meter.add(torch.tensor(float(it)), rows=2, it=it, epoch=0)
        assert reads == []
    assert meter.mean() == 5.5 and reads == [10]


def test_a_mean_weighs_steps_by_their_rows_and_begins_anew_after_a_line(reads):
    meter = LossMeter(ALONE)
    meter.add(torch.tensor(1.0), rows=3, it=1, epoch=0)
    meter.add(torch.tensor(5.0), rows=1, it=2, epoch=0)
    assert meter.mean() == 2
    meter.add(torch.tensor(7.0), rows=1, it=3, epoch=0)
    assert meter.mean() == 7


def test_memory_on_the_device_is_bounded(reads):
    meter = LossMeter(ALONE)
    for it in range(LOSSES_ON_DEVICE + 1):
        meter.add(torch.tensor(2.0), rows=1, it=it, epoch=0)
    assert reads == [LOSSES_ON_DEVICE]
    assert meter.mean() == 2 and reads == [LOSSES_ON_DEVICE, 1]


def test_a_loss_that_is_not_finite_names_its_step(reads):
    meter = LossMeter(ALONE)
    for it, loss in ((1, 1.0), (2, float("nan")), (3, float("inf"))):
        meter.add(torch.tensor(loss), rows=1, it=it, epoch=4)
    with pytest.raises(UserError, match="the loss became nan at it 2 of epoch 4"):
        meter.mean()
