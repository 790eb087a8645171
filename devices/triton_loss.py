"""The binary cross entropy in Triton; model/losses.py has the operators with the same results.

devices/triton_kernels.py says what is common to all kernels.
"""

import torch
import triton
import triton.language as tl

LOSS_ROWS = 256  # rows of a batch whose losses one program computes


@triton.jit
def _add(a, b):
    return a + b


# The sum for tl.reduce. Triton's interpreter knows its own: it calls another one for each number.
add = getattr(tl.standard, "_sum_combine", _add)


@triton.jit
def _log1p(x):
    """log(1 + x), exact in the digits of a small x too (Goldberg, 1991, theorem 4)."""
    one = 1 + x
    exact = one == 1
    return tl.where(exact, x, tl.log(one) * (x / tl.where(exact, 1.0, one - 1)))


@triton.jit
def class_of(label):
    """Which weight a label has: it is cut to 0 or 1."""
    return tl.minimum(tl.maximum(label.to(tl.int32), 0), 1)


@triton.jit
def entropy(p, label):
    """The loss of probabilities of label 1, and its gradient."""
    # `where` keeps nan, while tl.maximum would return its other operand
    log_one, log_zero = tl.log(p), _log1p(-p)
    log_one = tl.where(log_one < -100, -100.0, log_one)
    log_zero = tl.where(log_zero < -100, -100.0, log_zero)
    variance = (1 - p) * p
    variance = tl.where(variance < 1e-12, 1e-12, variance)
    return -(log_zero + label * (log_one - log_zero)), (p - label) / variance


@triton.jit
def _cross_entropy(
    predicted,
    label,
    label_weights,
    mask,
    gradient,
    sums,
    num_rows,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    p = tl.load(predicted + row, mask=inside, other=0.5)
    y = tl.load(label + row, mask=inside, other=0.0)
    weight = tl.load(label_weights + class_of(y), mask=inside, other=0.0)
    if HAS_MASK:
        weight *= tl.load(mask + row, mask=inside, other=0.0)
    loss, of_p = entropy(p, y)
    tl.store(sums + tl.program_id(0), tl.reduce(tl.where(inside, loss * weight, 0.0), 0, add))
    tl.store(gradient + row, of_p * weight, mask=inside)


def cross_entropy(
    predicted: torch.Tensor,
    label: torch.Tensor,
    label_weights: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross entropy, summed over rows, and its gradient (b, 1).

    model/losses.py has the operators with the same results.

    Args:
        predicted: (b, 1) float32 probabilities of label 1.
        label: (b, 1) float32.
        label_weights: (2,) weights of rows whose label, cut to an integer, is 0 or 1.
        mask: (b, 1) 1 for rows that count, 0 for padding; None: all rows count.
    """
    num_rows = len(predicted)
    gradient = torch.empty_like(predicted)
    grid = (triton.cdiv(num_rows, LOSS_ROWS),)
    sums = predicted.new_zeros(grid)
    if num_rows:
        tensors = (predicted, label, label_weights, predicted if mask is None else mask)
        settings = {"HAS_MASK": mask is not None, "ROWS": LOSS_ROWS}
        _cross_entropy[grid](*tensors, gradient, sums, num_rows, **settings)
    return sums.sum(), gradient
