"""MLPs in 16 bits as on a GPU: the numbers of torch's modules, to the rounding of 16 bits.

No GPU is needed: operators and, in float16, interpreted kernels compute them on the CPU.
"""

import copy

import numpy as np
import pytest
import torch
from emulated_graph import capture
from torch import nn

from devices.execution import Execution
from devices.gpu import OLDEST_TRITON, triton_version
from model.layer_operators import Target
from model.lower_mlp import flatten, flatten_if_lower
from model.mlp import MLP
from optim.flat_parameters import FlatOptimizer

CPU = torch.device("cpu")
BOTTOM, TOP = (13, 24, 8), (21, 16, 1)
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # a rounding, of numbers near 1
needs_triton = pytest.mark.skipif(triton_version() < OLDEST_TRITON, reason="no Triton here")


@pytest.fixture(params=["operators", pytest.param("kernels", marks=needs_triton)])
def triton(request, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param == "kernels"


def make(triton, lower=torch.float16, widths=(BOTTOM, TOP)):
    """(bottom MLP, top MLP, their flat parameters, the same of torch's modules in float64)."""
    np.random.seed(1)
    mlps = [
        MLP(of_one, last(), CPU, lower)
        for of_one, last in zip(widths, (nn.ReLU, nn.Sigmoid), strict=True)
    ]
    theirs = [nn.Sequential(*copy.deepcopy(list(mlp))).double() for mlp in mlps]
    return *mlps, flatten(mlps, lower, triton), theirs


def inputs(num_rows, width=13, seed=2):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def assert_near(got, want, lower, name=""):
    """Within some roundings of 16 bits, taken together: a ReLU may let another row through."""
    assert got.shape == want.shape, name
    far = (got.double() - want.double()).norm()
    assert far <= 24 * STEP[lower] * want.double().norm(), name


def gradients(flat):
    """{number: its gradient, without what rows are filled up with}."""
    return [flat.gradient_of(k)[..., : p.shape[-1]].clone() for k, p in enumerate(flat.parameters)]


def joined(bottom, top, features):
    """Bottom, as much as an interaction adds, top's inputs."""
    out = bottom(features)
    return torch.cat([out, features.to(out.dtype)], dim=1)


LOWER = {True: [torch.float16], False: [torch.float16, torch.bfloat16]}


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_torchs(triton, lower):
    if lower not in LOWER[triton]:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    bottom, top, flat, theirs = make(triton, lower)
    features, gradient = inputs(70), inputs(70, 1, seed=4)
    got = top(joined(bottom, top, features))
    want = theirs[1](joined(*theirs, features.double()))
    got.backward(gradient)
    want.backward(gradient.double())
    assert got.dtype == torch.float32
    assert_near(got, want, lower)
    wanted = [p.grad for one in theirs for p in one.parameters()]
    for number, (mine, other) in enumerate(zip(gradients(flat), wanted, strict=True)):
        assert mine.dtype == torch.float32
        assert_near(mine, other, lower, str(number))


def test_the_loss_and_its_gradients_are_torchs(triton):
    bottom, top, flat, theirs = make(triton)
    features, label = inputs(70), (inputs(70, 1, seed=3) > 0).float()
    target = Target(label, torch.ones(2), divisor=70)
    got = top.lower_layers.with_loss(joined(bottom, top, features), target)
    got.backward()
    predicted = theirs[1](joined(*theirs, features.double()))
    want = nn.functional.binary_cross_entropy(predicted, label.double(), reduction="sum")
    (want / 70).backward()
    assert_near(got.detach(), want.detach(), torch.float16)
    wanted = [p.grad for one in theirs for p in one.parameters()]
    for number, (mine, other) in enumerate(zip(gradients(flat), wanted, strict=True)):
        assert_near(mine, other, torch.float16, str(number))


def test_logits_near_each_other_stay_apart(triton):
    """In bfloat16 logits between 2 and 4 would have steps of 1/64, and rows would tie."""
    lower = torch.float16 if triton else torch.bfloat16
    _, top, _, _ = make(triton, lower)
    with torch.no_grad():
        top.in_order[-2].fill_(0.25)
        top.in_order[-1].fill_(2.5)
    found = top(inputs(200, 21))
    assert found.dtype == torch.float32 and len(found.unique()) > 190


def test_sums_of_gradients_are_not_rounded_to_16_bits(triton):
    """3000 rows give a bias and a weight a gradient that 16 bits do not hold."""
    bottom, _, flat, _ = make(triton, widths=((8, 8), (8, 1)))
    with torch.no_grad():
        bottom.in_order[0].fill_(1.0)
    bottom(torch.ones(3001, 8)).backward(torch.ones(3001, 8, dtype=torch.float16))
    weight, bias = gradients(flat)[:2]
    assert (weight == 3001).all() and (bias == 3001).all()
    assert torch.tensor(3001.0).half().item() == 3000


def test_chunks_of_a_batch_add_up(triton):
    bottom, top, flat, _ = make(triton)
    features, gradient = inputs(90), inputs(90, 1, seed=4)
    top(joined(bottom, top, features)).backward(gradient)
    want = gradients(flat)
    for chunk in (flat.gradients, flat.lowered):
        assert chunk.any()
    flat.gradients.zero_()
    flat.num_updates += 1
    for rows, of_rows in zip(features.split(40), gradient.split(40), strict=True):
        top(joined(bottom, top, rows)).backward(of_rows)
    for mine, other in zip(gradients(flat), want, strict=True):
        assert_near(mine, other, torch.float16)


@pytest.mark.parametrize("is_adagrad", [False, True], ids=["sgd", "adagrad"])
def test_steps_are_those_of_torchs_optimisers(triton, is_adagrad):
    bottom, top, flat, theirs = make(triton)
    optimizer = FlatOptimizer(flat, 0.1, is_adagrad, triton)
    parameters = [p for one in theirs for p in one.parameters()]
    kind = torch.optim.Adagrad if is_adagrad else torch.optim.SGD
    other, before = kind(parameters, lr=0.1), flat.values.clone()
    for seed in range(2):
        top(joined(bottom, top, inputs(60, seed=seed))).sum().backward()
        for parameter, mine in zip(parameters, gradients(flat), strict=True):
            parameter.grad = mine.double()
        assert optimizer.gradients()[0].any()
        optimizer.update(0.1)
        other.step()
        assert not flat.gradients.any()
    assert not torch.equal(flat.values, before)
    for mine, wanted in zip(flat.parameters, parameters, strict=True):
        torch.testing.assert_close(mine.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    state, wanted = optimizer.state_dict(), other.state_dict()["state"]
    assert len(state["state"]) == (len(parameters) if is_adagrad else 0)
    for number, of_one in state["state"].items():
        assert of_one["step"] == wanted[number]["step"] == 2
        torch.testing.assert_close(of_one["sum"].double(), wanted[number]["sum"], rtol=1e-4, atol=0)


def test_what_is_loaded_is_computed_with(triton):
    """Model files and checkpoints write parameters in place; their copies follow."""
    bottom, top, _, _ = make(triton)
    other_bottom, other_top, _, _ = make(triton)
    with torch.no_grad():
        for parameter in [*other_bottom.parameters(), *other_top.parameters()]:
            parameter.add_(0.5)
    features = inputs(5)
    want = other_top(joined(other_bottom, other_top, features))
    before = top(joined(bottom, top, features))
    bottom.load_state_dict(other_bottom.state_dict())
    for own, other in zip(top.parameters(), other_top.parameters(), strict=True):
        own.detach().copy_(other.detach())  # as checkpoints do
    got = top(joined(bottom, top, features))
    assert torch.equal(got, want) and not torch.equal(got, before)


def hiding(bias, inputs, weight):
    """A product with a ReLU as a GPU's may be."""
    return torch.addmm(bias, inputs, weight).nan_to_num(0.0).relu_()


def test_without_the_loss_nothing_hides_nan(triton, monkeypatch):
    """Evaluations show it, and batches with it can be skipped."""
    monkeypatch.setattr(torch, "_addmm_activation", hiding)
    bottom, top, _, _ = make(triton)
    features = inputs(5)
    features[2, 3] = float("nan")
    assert top(joined(bottom, top, features)).isnan().view(-1).tolist() == [False] * 2 + [
        True, False, False
    ]  # fmt: skip
    assert not bottom(features, is_fast=True).isnan().any()


def test_a_parameter_that_becomes_nan_behind_a_relu_is_noted(triton, monkeypatch):
    monkeypatch.setattr(torch, "_addmm_activation", hiding)
    bottom, top, flat, _ = make(triton)
    optimizer = FlatOptimizer(flat, 0.1, False, triton)
    target = Target(torch.ones(5, 1), torch.ones(2))
    for bad in (False, True):
        features = inputs(5)
        features[2, 3] = float("nan") if bad else 0.0
        dense = torch.cat([bottom(features, is_fast=True), torch.zeros(5, 13)], dim=1)
        loss = top.lower_layers.with_loss(dense, target)
        loss.backward()
        optimizer.update(0.1)
        assert loss.isfinite(), "hidden"
        assert flat.values.isnan().any() == flat.broken.isnan() == bad


@pytest.mark.parametrize("is_adagrad", [False, True], ids=["sgd", "adagrad"])
def test_replayed_steps_are_the_steps(is_adagrad):
    """None of a step's Python runs in a replay; steps of another shape come in between."""
    found = []
    for records in (False, True):
        bottom, top, flat, _ = make(False)
        optimizer = FlatOptimizer(flat, 0.1, is_adagrad, triton=False)
        features, label, rate = inputs(40), torch.ones(40, 1), torch.tensor(0.1)

        def work(features=features, label=label, rate=rate, parts=(bottom, top, optimizer)):
            bottom, top, optimizer = parts
            dense = bottom(features, is_fast=True)
            vectors = torch.cat([dense, features.to(dense.dtype)], dim=1)
            target = Target(label, torch.ones(2), divisor=len(features))
            loss = top.lower_layers.with_loss(vectors, target)
            loss.backward()
            optimizer.update(rate)
            return loss

        losses, graph, recorded = [], None, None
        for number in range(8):
            features.copy_(inputs(40, seed=number))
            label.copy_(inputs(40, 1, seed=50 + number) > 0)
            if records and number == 3:
                graph, recorded = capture(work)
            if graph is None:
                losses.append(work().item())
            else:
                graph.replay()
                losses.append(recorded.item())
            if number == 5:
                losses.append(work(inputs(7, seed=9), torch.ones(7, 1)).item())
                with torch.no_grad():
                    losses.append(top(joined(bottom, top, inputs(3))).sum().item())
        found.append((losses, flat.values.clone()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-7)


def test_only_a_gpu_or_triton_has_flat_parameters():
    np.random.seed(1)
    mlps = [MLP(BOTTOM, nn.ReLU(), CPU, torch.bfloat16), MLP(TOP, nn.Sigmoid(), CPU)]
    assert flatten_if_lower(mlps, Execution(lower=torch.bfloat16)) is None
    assert flatten_if_lower(mlps, Execution(triton=True)) is None
    assert mlps[0].lower_layers is None and not mlps[1].computes_loss


def test_the_numbers_of_a_model_file_lie_side_by_side(triton):
    """Parameters are parts of one buffer, rows of copies are longer: files see neither."""
    bottom, top, flat, _ = make(triton)
    assert all(parameter.is_contiguous() for parameter in flat.parameters)
    assert len(flat.values) % 64 == 0 and bottom.in_order[0].shape == (24, 13)
    assert flat.lowered_of(0).shape == (24, 16) and not flat.lowered_of(0)[:, 13:].any()
    assert flat.lowered_of(4).shape == (16, 24)
    for number in range(len(flat.parameters)):
        assert flat.lowered_of(number).data_ptr() % 16 == 0
