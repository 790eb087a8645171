"""Losses and their gradients equal the formulas, by the CPU's kernel and by operators."""

import pytest
import torch
from conftest import at
from torch import nn

from model.losses import cross_entropy, make_loss

KINDS = ("mse", "bce", "wbce")
LABEL_WEIGHTS = (0.5, 3.0)  # weights of wbce


def all_losses(kind, label):
    """(name, predictions -> (sum of losses, gradient)): of the CPU, and of other devices."""
    on_cpu = make_loss(kind, LABEL_WEIGHTS, torch.device("cpu"))
    yield "cpu", lambda predicted: on_cpu(predicted, label, None)
    if kind != "mse":  # it is the same everywhere
        weights = torch.tensor(LABEL_WEIGHTS if kind == "wbce" else (1.0, 1.0))
        yield "other", lambda predicted: cross_entropy(predicted, label, weights, None)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_equal_the_formulas(kind):
    label = torch.cat([torch.rand(20, 1), torch.zeros(5, 1), torch.ones(5, 1)])
    predicted = torch.rand(30, 1) * 0.98 + 0.01
    p, y = predicted.double().requires_grad_(), label.double()
    entropy = -(y * p.log() + (1 - y) * (1 - p).log())
    weight = torch.where(y.long() == 0, *LABEL_WEIGHTS)
    want = {"mse": (p - y).square(), "bce": entropy, "wbce": weight * entropy}[kind].sum()
    want.backward()
    for name, loss in all_losses(kind, label):
        got, gradient = loss(predicted.clone())
        assert gradient.shape == predicted.shape
        torch.testing.assert_close(got, want.float().detach(), rtol=1e-5, atol=0, msg=at(name))
        torch.testing.assert_close(gradient, p.grad.float(), rtol=1e-5, atol=1e-5, msg=at(name))


@pytest.mark.parametrize("kind", ["bce", "wbce"])
def test_predictions_of_exactly_0_and_1_lose_what_torch_says(kind):
    """It cuts logarithms off at -100, so that a sure and wrong prediction ruins no mean."""
    predicted = torch.tensor([[0.0], [0.0], [1.0], [1.0], [0.25], [0.0], [1e-30]])
    label = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [0.5], [1.0]])
    p = predicted.clone().requires_grad_()
    weight = torch.where(label.long() == 0, *LABEL_WEIGHTS) if kind == "wbce" else None
    want = nn.functional.binary_cross_entropy(p, label, weight, reduction="sum")
    want.backward()
    for name, loss in all_losses(kind, label):
        got, gradient = loss(predicted)
        torch.testing.assert_close(got, want.detach(), msg=at(name))
        torch.testing.assert_close(gradient, p.grad, msg=at(name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_that_is_nan_makes_the_loss_nan_and_no_crash(kind):
    """torch's own asserts in its kernel, after which a GPU is lost to the process."""
    predicted = torch.tensor([[0.25], [float("nan")], [0.75]])
    for name, loss in all_losses(kind, torch.tensor([[0.0], [1.0], [1.0]])):
        got, gradient = loss(predicted)
        assert got.isnan(), name
        assert gradient.isnan().view(-1).tolist() == [False, True, False], name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_padding_count_nothing(kind):
    predicted, label = torch.rand(9, 1) * 0.98 + 0.01, torch.rand(9, 1).round()
    mask = (torch.arange(9) < 5).float()[:, None]
    if kind == "mse":
        loss = make_loss(kind, LABEL_WEIGHTS, torch.device("cpu"))
    else:  # batches are not padded on the CPU, which has no mask in its kernel

        def loss(predicted, label, mask):
            return cross_entropy(predicted, label, torch.tensor(LABEL_WEIGHTS), mask)

    got, gradient = loss(predicted, label, mask)
    want, wanted = loss(predicted[:5], label[:5], None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient[:5], wanted)
    assert not gradient[5:].any()
