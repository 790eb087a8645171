"""The kernel of the cross entropy equals the operators."""

import pytest
import torch
from interpreted import DEVICE, kernel_module

from model.losses import cross_entropy


@pytest.fixture(scope="module")
def kernels():
    with kernel_module("loss") as module:
        yield module


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_the_loss_and_its_gradient_are_the_operators(kernels, weights, padded):
    random = torch.Generator().manual_seed(1)
    predicted = torch.rand(300, 1, generator=random).to(DEVICE)
    predicted[:4, 0] = torch.tensor([0.0, 1.0, 1e-9, 1 - 1e-7])
    label = torch.rand(300, 1, generator=random).round().to(DEVICE)
    label[:4, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    label[7] = 0.4
    label_weights = torch.tensor(weights, device=DEVICE)
    mask = (torch.arange(300, device=DEVICE) < 290).float()[:, None] if padded else None
    want = cross_entropy(predicted, label, label_weights, mask)
    got = kernels.cross_entropy(predicted, label, label_weights, mask)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
    predicted[5] = float("nan")
    loss, gradient = kernels.cross_entropy(predicted, label, label_weights, mask)
    assert loss.isnan() and gradient[5].isnan() and gradient.isnan().sum() == 1
    assert kernels.cross_entropy(predicted[:0], label[:0], label_weights, None)[0] == 0
