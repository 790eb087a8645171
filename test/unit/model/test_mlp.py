"""An MLP equals torch's modules, whichever products compute it, and its weights are numpy's."""

import copy

import numpy as np
import pytest
import torch
from conftest import at
from torch import nn

from model import mlp
from model.mlp import MLP, onednn_linear

CPU = torch.device("cpu")
LAST = {"ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid}
# name: (widths, rows); only what is wide and of many rows is oneDNN's
CASES = {
    "narrow": ((13, 1), 5),
    "narrow_of_many_rows": ((13, 32, 1), 600),
    "few_rows": ((80, 128, 64), 511),
    "one_row": ((13, 64, 128, 16), 1),
    "wide": ((80, 64, 128, 65), 512),
    "wide_to_one": ((13, 128, 64, 1), 600),
}


def make(widths, last, rows):
    """(MLP, the same of torch's modules in float64, inputs, a gradient of the outputs)."""
    np.random.seed(1)
    ours = MLP(widths, LAST[last](), CPU)
    random = torch.Generator().manual_seed(2)
    inputs = torch.randn(rows, widths[0], generator=random)
    gradient = torch.randn(rows, widths[-1], generator=random)
    return ours, nn.Sequential(*copy.deepcopy(list(ours))).double(), inputs, gradient


def assert_close(got, want, name=""):
    """Within what float32 sums of some hundred terms allow."""
    tolerance = 2e-6 * max(1.0, want.abs().max().item()) if want.numel() else 0
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=tolerance, msg=at(name))


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_torchs(name, last):
    ours, theirs, inputs, gradient = make(CASES[name][0], last, CASES[name][1])
    mine, wanted = inputs.requires_grad_(), inputs.detach().double().requires_grad_()
    got, want = ours(mine), theirs(wanted)
    got.backward(gradient)
    want.backward(gradient.double())
    assert_close(got, want)
    assert_close(mine.grad, wanted.grad)
    for key, value in gradients(ours).items():
        assert_close(value, gradients(theirs)[key], key)


@pytest.mark.skipif(onednn_linear is None, reason="no such oneDNN operator in this torch")
@pytest.mark.parametrize("name", CASES)
def test_only_wide_products_of_many_rows_are_onednns(name, monkeypatch):
    ours, _, inputs, gradient = make(CASES[name][0], "ReLU", CASES[name][1])
    calls, linear = [], onednn_linear

    def counted(*args):
        calls.append(args)
        return linear(*args)

    monkeypatch.setattr(mlp, "onednn_linear", counted)
    ours(inputs).backward(gradient)
    # forward: layers of at least 64 inputs and outputs; backward: the same but the first
    assert len(calls) == {"wide": 3 + 2, "wide_to_one": 1 + 1}.get(name, 0)


@pytest.mark.parametrize("name", CASES)
def test_inputs_that_need_no_gradient_get_none_and_change_no_other(name):
    ours, theirs, inputs, gradient = make(CASES[name][0], "ReLU", CASES[name][1])
    ours(inputs).backward(gradient)
    theirs(inputs.double()).backward(gradient.double())
    assert inputs.grad is None
    for key, value in gradients(ours).items():
        assert_close(value, gradients(theirs)[key], key)


@pytest.mark.parametrize("name", CASES)
def test_backward_passes_add_up(name):
    """Chunks of a batch, one after the other, are the batch."""
    ours, theirs, inputs, gradient = make(CASES[name][0], "Sigmoid", CASES[name][1])
    theirs(inputs.double()).backward(gradient.double())
    for chunk, of_chunk in zip(inputs.split(300), gradient.split(300), strict=True):
        ours(chunk).backward(of_chunk)
    for key, value in gradients(ours).items():
        assert_close(value, gradients(theirs)[key], key)


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", CASES)
def test_a_step_in_the_backward_pass_is_that_of_torchs_sgd(name, last):
    ours, theirs, inputs, gradient = make(CASES[name][0], last, CASES[name][1])
    mine, wanted = inputs.requires_grad_(), inputs.detach().double().requires_grad_()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        ours(mine, sgd_lr=0.05).backward(gradient / len(inputs))
        theirs(wanted).backward(gradient.double() / len(inputs))
        optimizer.step()
        assert all(value is None for value in gradients(ours).values())
    assert_close(mine.grad, wanted.grad)
    for key, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[key], key)


def test_without_the_step_gradients_are_made_again():
    ours, theirs, inputs, gradient = make((13, 64, 1), "Sigmoid", 9)
    ours(inputs, sgd_lr=0.0).backward(gradient)
    ours(inputs).backward(gradient)
    theirs(inputs.double()).backward(gradient.double())
    for key, value in gradients(ours).items():
        assert_close(value, gradients(theirs)[key], key)


def test_a_share_of_no_rows_has_gradients_of_zero():
    """A rank without rows of a batch takes part in the sum over ranks."""
    ours, _, inputs, gradient = make((13, 64, 128, 1), "Sigmoid", 0)
    ours(inputs).backward(gradient)
    assert all(not value.any() for value in gradients(ours).values())


def test_the_state_has_the_names_of_torchs_sequence():
    ours, theirs, *_ = make((13, 64, 128, 1), "Sigmoid", 1)
    assert list(ours.state_dict()) == [
        "0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias",
    ]  # fmt: skip
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_loaded_state_is_what_is_computed_with():
    ours, theirs, inputs, _ = make((13, 64, 1), "Sigmoid", 4)
    for parameter in theirs.parameters():
        parameter.data.mul_(-2)
    ours.load_state_dict(theirs.float().state_dict())
    assert_close(ours(inputs), theirs.double()(inputs.double()))


@pytest.mark.parametrize("rows", [100, 600])
def test_nan_stays_nan(rows):
    """A relu that turns it into 0, as oneDNN's does, would hide that a model diverges."""
    ours, _, inputs, _ = make((80, 128, 64, 1), "Sigmoid", rows)
    inputs[3] = float("nan")
    outputs = ours(inputs)
    assert outputs[3].isnan() and outputs.isnan().sum() == 1


def test_initial_weights_follow_the_contract():
    """numpy's global generator, layer by layer, a layer's weight before its bias."""
    np.random.seed(3)
    state = MLP((5, 8, 4), nn.ReLU(), CPU).state_dict()
    np.random.seed(3)
    for layer, (n, m) in zip((0, 2), ((5, 8), (8, 4)), strict=True):
        for name, deviation, size in (
            ("weight", np.sqrt(2 / (m + n)), (m, n)), ("bias", np.sqrt(1 / m), m),
        ):  # fmt: skip
            want = np.random.normal(0, deviation, size).astype(np.float32)
            np.testing.assert_array_equal(state[f"{layer}.{name}"].numpy(), want)


# ---------------------------------------------------------------- lower precision, and a GPU's way


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid])
def test_an_mlp_in_lower_precision_comes_near_float32(lower, last):
    nets = []
    for dtype in (None, lower):
        np.random.seed(0)
        nets.append(MLP((13, 32, 8), last(), CPU, dtype))
    inputs = torch.rand(50, 13, generator=torch.Generator().manual_seed(0))
    want, got = (net(inputs) for net in nets)
    assert got.dtype == (torch.float32 if last is nn.Sigmoid else lower)
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    for net, outputs in zip(nets, (want, got), strict=True):
        outputs.float().sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    for one, other in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 0.03 * other.grad.norm()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_a_sure_prediction_is_not_rounded_to_one(lower):
    """bfloat16 has no number between 0.996 and 1: the loss of such a prediction was 100."""
    np.random.seed(0)
    net = MLP((1, 1), nn.Sigmoid(), CPU, lower)
    with torch.no_grad():
        net[0].weight.fill_(9.0)
        net[0].bias.zero_()
        assert 0.9998 < float(net(torch.ones(1, 1))) < 1


@pytest.mark.parametrize("wider", [0, 3], ids=["as wide", "wider"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_columns_of_zeros_change_nothing(on_gpu, wider):
    """A GPU's products want widths that are multiples of 8."""
    np.random.seed(1)
    ours = MLP((13, 24, 1), nn.Sigmoid(), CPU, torch.float32)
    ours._on_gpu = on_gpu
    inputs = torch.randn(6, 13, generator=torch.Generator().manual_seed(2))
    want = ours(inputs)
    want.sum().backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(ours).items()}
    ours.zero_grad()
    wide = nn.functional.pad(inputs, (0, wider)).requires_grad_()
    got = ours(wide)
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert wide.grad.shape == (6, 13 + wider) and not wide.grad[:, 13:].any()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)


def test_parameters_are_lowered_together_as_one_by_one():
    np.random.seed(1)
    ours = MLP((13, 24, 1), nn.Sigmoid(), CPU, torch.bfloat16)
    inputs = torch.randn(6, 13, generator=torch.Generator().manual_seed(2))
    found = []
    for on_gpu in (True, False):
        ours._on_gpu = on_gpu
        ours.zero_grad()
        outputs = ours(inputs)
        outputs.sum().backward()
        found.append({"outputs": outputs, **gradients(ours)})
    for name, want in found[1].items():
        assert found[0][name].dtype == torch.float32
        torch.testing.assert_close(found[0][name], want, rtol=1e-2, atol=1e-3, msg=at(name))
