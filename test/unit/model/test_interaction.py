"""The dot interaction equals loops over pairs, forward and back, by kernels and by operators."""

import pytest
import torch
from naive_interaction import draw, naive, num_pairs

from model.interaction import DotInteraction

# of rows, tables, and the dimension
SHAPES = [(7, 3, 4), (5, 26, 16), (1, 1, 1), (3, 2, 64), (0, 3, 4), (33, 26, 17)]


def make(num_tables, itself, on_cpu):
    module = DotInteraction(num_tables + 1, itself, torch.device("cpu"))
    assert module._on_cpu
    module._on_cpu = on_cpu
    return module


@pytest.mark.parametrize("on_cpu", [True, False], ids=["kernels", "operators"])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients_equal_loops(shape, itself, on_cpu):
    tensors = draw(shape)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    wanted = [tensor.detach().double().requires_grad_() for tensor in tensors]
    got, want = make(shape[1], itself, on_cpu)(*inputs), naive(*wanted, itself)
    assert got.shape == (shape[0], shape[2] + num_pairs(shape[1], itself))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    got.backward(gradient)
    want.backward(gradient.double())
    for mine, theirs in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_cpu", [True, False], ids=["kernels", "operators"])
@pytest.mark.parametrize("itself", [True, False])
def test_a_gradient_need_not_lie_in_order(itself, on_cpu):
    """Autograd passes expanded and transposed ones."""
    for change in (lambda out: out.sum(), lambda out: (out.t().contiguous() ** 2).sum()):
        tensors = draw((6, 4, 8))
        inputs = [tensor.requires_grad_() for tensor in tensors]
        wanted = [tensor.detach().double().requires_grad_() for tensor in tensors]
        change(make(4, itself, on_cpu)(*inputs)).backward()
        change(naive(*wanted, itself)).backward()
        for mine, theirs in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=2e-4)
