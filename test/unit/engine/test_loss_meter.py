"""Losses stay on the device until they are printed: one read a line, none a step."""

import json
import math

import numpy as np
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

    def summed(process, losses):
        sizes.append(len(losses))
        return losses

    monkeypatch.setattr(loss_meter, "sum_in_rank_order", summed)
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


def add_losses(meter, losses, begin=0):
    for it, loss in enumerate(losses, begin + 1):
        meter.add(torch.tensor(loss), rows=3 + it % 5, it=it, epoch=2)


def test_losses_that_are_not_finite_are_left_out_if_their_batches_were_skipped():
    meter = LossMeter(ALONE, skips=True)
    add_losses(meter, [1.0, float("inf"), float("nan"), 4.0])
    assert meter.mean() == (4 * 1 + 7 * 4) / 11
    warning = "warning: the loss of 2 batch(es) was not finite, the first at it 2 of epoch 2: "
    assert meter.take_warning() == warning + "skipped (--on-nan=skip)"
    assert meter.take_warning() == ""
    add_losses(meter, [float("nan")], begin=4)
    assert math.isnan(meter.mean()) and "first at it 5" in meter.take_warning()
    add_losses(meter, [7.0], begin=5)
    assert meter.mean() == 7 and meter.take_warning() == ""


@pytest.mark.parametrize("cut", [0, 1, 13, 40])
def test_a_resumed_meter_tells_what_an_uninterrupted_one_tells(cut):
    """To the last bit, through a file of JSON."""
    losses = np.random.default_rng(0).random(40).astype(np.float32).tolist()
    losses[0] = losses[20] = losses[30] = float("nan")
    whole, first, rest = (LossMeter(ALONE, skips=True) for _ in range(3))
    add_losses(whole, losses)
    add_losses(first, losses[:cut])
    state = first.state()
    rest.restore(json.loads(json.dumps(state)))
    assert rest.state() == state
    add_losses(rest, losses[cut:], begin=cut)
    assert rest.mean() == whole.mean() and rest.take_warning() == whole.take_warning()


def test_a_state_is_not_told_of_a_run_that_has_to_stop():
    meter = LossMeter(ALONE)
    add_losses(meter, [1.0, float("nan")])
    with pytest.raises(UserError, match="the loss became nan at it 2 of epoch 2"):
        meter.state()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"sum": float("nan")}, "sum of losses is nan"),
        ({"sum": "1"}, "sum of losses is '1'"),
        ({"rows": -1}, "rows is -1"),
        ({"rows": 2.0}, "rows is 2.0"),
        ({"rows": 10**400}, "rows is 1000"),
        ({"skipped": None}, "skipped is None"),
        ({"first_it": True}, "first_it is True"),
        ({"first_epoch": "0"}, "first_epoch is '0'"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, word):
    meter = LossMeter(ALONE)
    with pytest.raises(ValueError, match=word):
        meter.restore(meter.state() | change)
    with pytest.raises(ValueError, match="expected"):
        meter.restore({})
