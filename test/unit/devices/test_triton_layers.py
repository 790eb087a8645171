"""Kernels for MLPs in 16 bits equal their operators, and these the gradients of autograd."""

import pytest
import torch
from interpreted import DEVICE, LOWER, kernel_module

from model import layer_operators
from model.layer_operators import Target
from optim import flat_parameters

STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # between numbers at 1


@pytest.fixture(scope="module")
def kernels():
    with kernel_module("layers") as module:
        yield module


def draw(*shape, seed=1, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (70, 24), (33, 300), (0, 16)], ids=str)
def test_relu_backward_and_bias_sums_are_the_operators(kernels, shape, in_place, dtype):
    gradient, output = draw(*shape, dtype=dtype), draw(*shape, seed=2, dtype=dtype).relu()
    if output.numel() > 1:
        output.view(-1)[1] = float("nan")  # lets its gradient pass, as in torch
    sums = [torch.ones(shape[1], device=DEVICE) for _ in range(2)]
    mine, given = gradient.clone(), gradient.clone()
    want = layer_operators.relu_backward(given, output, sums[0], False)
    got = kernels.relu_backward(mine, output, sums[1], in_place)
    assert torch.equal(got, want)
    assert (got.data_ptr() == mine.data_ptr()) == in_place or not mine.numel()
    assert in_place or torch.equal(mine, gradient), "what is not its own stays as it is"
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-5)


def test_programs_take_several_passes_if_enough_are_left(kernels):
    """One program more than enough for two passes, and so on up to the most."""
    found = [kernels._passes(programs, 8) for programs in (1, 1023, 1024, 2048, 4096, 10**6)]
    assert found == [1, 1, 2, 4, 8, 8]


def test_many_rows_take_several_passes(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_PROGRAMS", 0)
    gradient, output = draw(300, 20, dtype=LOWER[0]), draw(300, 20, seed=2, dtype=LOWER[0]).relu()
    sums = [torch.zeros(20, device=DEVICE) for _ in range(2)]
    want = layer_operators.relu_backward(gradient, output, sums[0], False)
    assert torch.equal(kernels.relu_backward(gradient, output, sums[1], False), want)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-5)


HEADS = {
    "plain": {},
    "mask": {"mask": (torch.arange(77) < 70).float()[:, None]},
    "clamp": {"clamp": 0.3},
    "scale": {"scale": torch.tensor([1024.0]), "divisor": 77},
}


def head_case(name, width, dtype, has_relu):
    """(hidden, parameters, target, three gradients to add to)."""
    hidden = draw(77, width, dtype=dtype)
    hidden = hidden.relu() if has_relu else hidden
    parameters = draw(1, width, seed=2) / width**0.5, draw(1, seed=3)
    label = (draw(77, 1, seed=4) > 0).float()
    label[3] = 0.4
    fields = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
              for key, value in HEADS[name].items()}  # fmt: skip
    target = Target(label, torch.tensor([1.0, 3.0], device=DEVICE), **fields)
    gradients = torch.ones(1, width), torch.ones(1), torch.ones(width) if has_relu else None
    return (
        hidden,
        parameters,
        target,
        [None if one is None else one.to(DEVICE) for one in gradients],
    )


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("has_relu", [True, False])
@pytest.mark.parametrize("width", [24, 256])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_operators(kernels, name, width, has_relu, dtype):
    *given, want_gradients = head_case(name, width, dtype, has_relu)
    *_, got_gradients = head_case(name, width, dtype, has_relu)
    want = layer_operators.head_with_loss(*given, want_gradients)
    got = kernels.head_with_loss(*given, got_gradients)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    near = {"rtol": STEP[dtype], "atol": 1e-4 * want[1].abs().max().item()}
    torch.testing.assert_close(got[1], want[1], **near)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        kernels.head(*given[:2]), layer_operators.head(*given[:2]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("has_relu", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_the_operators_of_the_head_are_autograds(name, has_relu):
    """torch's own binary cross entropy and derivatives, in float64."""
    hidden, parameters, target, gradients = head_case(name, 24, LOWER[0], has_relu)
    loss, of_hidden = layer_operators.head_with_loss(hidden, parameters, target, gradients)
    leaf = hidden.double().requires_grad_()
    before = torch.zeros(24, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight, bias = (one.double().requires_grad_() for one in parameters[:2])
    # the bias of the layer before: where its ReLU's output is 0 it has no gradient
    inputs = leaf + before * (leaf.detach() > 0) if has_relu else leaf
    p = (inputs @ weight.t() + bias).sigmoid().clamp(target.clamp, 1 - target.clamp)
    weights = torch.where(target.label >= 1, 3.0, 1.0).double()
    if target.mask is not None:
        weights = weights * target.mask
    entropy = torch.nn.functional.binary_cross_entropy
    want = entropy(p, target.label.double(), weights, reduction="sum")
    want.backward()
    factor = (1.0 if target.scale is None else target.scale.item()) / target.divisor
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
    wanted = weight.grad, bias.grad, before.grad if has_relu else None
    for got, one in zip(gradients, wanted, strict=True):
        if got is not None:
            torch.testing.assert_close(got.double(), 1 + one * factor, rtol=1e-4, atol=1e-4)
    of_inputs = leaf.grad * (hidden > 0) if has_relu else leaf.grad
    torch.testing.assert_close(of_hidden.double(), of_inputs * factor, rtol=2e-3, atol=1e-3)


def test_a_head_of_more_columns_ignores_the_zeros(kernels):
    hidden, parameters, target, gradients = head_case("plain", 21, LOWER[0], False)
    wide = torch.nn.functional.pad(hidden, (0, 3))
    want = layer_operators.head_with_loss(hidden, parameters, target, gradients)
    for functions in (kernels, layer_operators):
        got = functions.head_with_loss(wide, parameters, target, gradients)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1][:, :21], want[1], rtol=2e-3, atol=1e-5)
        assert not got[1][:, 21:].any()


def test_a_prediction_that_is_nan_shows(kernels):
    hidden, parameters, target, gradients = head_case("clamp", 24, LOWER[0], True)
    hidden[5, 7] = float("nan")
    for functions in (kernels, layer_operators):
        loss, gradient = functions.head_with_loss(hidden, parameters, target, gradients)
        assert loss.isnan() and gradient[5].isnan().any() and gradient.isnan().any(1).sum() == 1
        assert functions.head(hidden, parameters).isnan().sum() == 1


def test_a_width_that_no_program_holds_is_left_to_operators(kernels):
    assert kernels.head_fits(4096) and not kernels.head_fits(4097)


@pytest.mark.parametrize("is_adagrad", [True, False])
@pytest.mark.parametrize("on_device", [True, False], ids=["rate on device", "rate a number"])
def test_the_update_is_the_operators(kernels, on_device, is_adagrad):
    lr = torch.tensor(0.1, device=DEVICE) if on_device else 0.1
    places = torch.cat([torch.arange(1500), torch.arange(1600, 2300)]).int().to(DEVICE)
    found = []
    for functions in (kernels, flat_parameters):
        values, gradients = draw(2200), draw(2400, seed=2)
        gradients[2390:] = 0
        lowered = torch.zeros(2400, dtype=LOWER[0], device=DEVICE)
        broken = torch.zeros((), device=DEVICE)
        squares = draw(2200, seed=3).square() if is_adagrad else None
        buffers = values, gradients, lowered, places, broken
        functions.update_parameters(buffers, squares, lr, 1e-10)
        assert not gradients[places.long()].any() and broken == 0
        found.append([values, lowered, *([squares] if is_adagrad else [])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_noted(kernels, value):
    for functions in (kernels, flat_parameters):
        values, gradients = draw(2200), draw(2200)
        gradients[2100] = value
        broken, places = torch.zeros((), device=DEVICE), torch.arange(2200).int().to(DEVICE)
        buffers = values, gradients, values.to(LOWER[0]), places, broken
        functions.update_parameters(buffers, None, 0.1, 1e-10)
        assert broken.isnan()
        assert not gradients.any(), "the next step begins with gradients of 0"
