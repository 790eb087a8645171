"""Optimisers of the dense parameters follow torch.optim's to the bit, and have its state."""

import copy

import pytest
import torch
from torch import nn

from optim.dense import DenseAdagrad, DenseOptimizer, make_dense_optimizer

TORCHS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rwsadagrad": torch.optim.Adagrad}
LR = 0.1


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,), (1, 5))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def pair(name, fused=False):
    """Our optimiser and torch's, each with parameters of its own."""
    ours, theirs = make_parameters(), make_parameters()
    return make_dense_optimizer(name, ours, LR, fused), TORCHS[name](theirs, lr=LR), ours, theirs


def set_gradients(parameters, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if number in skip else gradient


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", TORCHS)
def test_steps_are_torchs_and_gradients_are_forgotten(name):
    optimizer, torchs, ours, theirs = pair(name)
    for step in range(4):
        skip = (1,) if step == 2 else ()  # a parameter without a gradient stays as it is
        set_gradients(ours, step, skip)
        set_gradients(theirs, step, skip)
        lr = LR / (1 + step)
        torchs.param_groups[0]["lr"] = optimizer.lr = lr
        torchs.step()
        optimizer.update(lr)
        assert_equal(ours, theirs)
        assert all(parameter.grad is None for parameter in ours)
    mine, wanted = optimizer.state_dict(), torchs.state_dict()
    assert mine["param_groups"] == wanted["param_groups"]
    assert list(mine["param_groups"][0]) == list(wanted["param_groups"][0])
    assert list(mine["state"]) == list(wanted["state"])
    for number, state in wanted["state"].items():
        assert list(mine["state"][number]) == list(state)
        assert all(torch.equal(mine["state"][number][key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_state_of_either_is_continued_by_the_other(name):
    optimizer, torchs, ours, theirs = pair(name)
    for one, parameters in ((optimizer.update, ours), (lambda _: torchs.step(), theirs)):
        set_gradients(parameters, 1)
        one(LR)
    our_next, their_next, ours_again, theirs_again = pair(name)
    our_next.load_state_dict(copy.deepcopy(torchs.state_dict()["state"]))
    their_next.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(ours_again, 2)
    set_gradients(theirs_again, 2)
    our_next.update(LR)
    their_next.step()
    assert_equal(ours_again, theirs_again)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_rate_on_the_device_makes_nearly_the_same_step(name):
    """As a recorded step takes it; its steps are counted on the host, apart."""
    one, _, first, second = pair(name)
    other = make_dense_optimizer(name, second, LR, False)
    for step in range(2):
        set_gradients(first, step)
        set_gradients(second, step)
        one.update(LR)
        other.update(torch.tensor(LR))
        other.count_step()
    for mine, wanted in zip(second, first, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert [state.get("step") for state in other.state] == [s.get("step") for s in one.state]


def test_the_fused_kernel_makes_the_same_step():
    fused, plain = make_parameters(), make_parameters()
    set_gradients(fused, 0)
    set_gradients(plain, 0)
    DenseOptimizer(fused, LR, fused=True).update(LR)
    DenseOptimizer(plain, LR).update(LR)
    for mine, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_state_of_other_shapes_and_missing_state_are_refused():
    optimizer = DenseAdagrad(make_parameters(), LR)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(KeyError):
        optimizer.load_state_dict({0: state[0]})
    state[1]["sum"] = torch.zeros(7)
    with pytest.raises(ValueError, match="state 1 has another shape"):
        optimizer.load_state_dict(state)


def test_steps_counted_as_numbers_are_read():
    """Files of older torch releases have them so."""
    optimizer = DenseAdagrad(make_parameters(), LR)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for one in state.values():
        one["step"] = 5
    optimizer.load_state_dict(state)
    assert all(float(one["step"]) == 5 for one in optimizer.state)
