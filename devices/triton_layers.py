"""Kernels in Triton for MLPs in 16 bits: ReLU backward, the head with the loss, the update.

model/layer_operators.py and optim/flat_parameters.py have the operators with the same results,
under the same names.
devices/triton_kernels.py says what is common to all kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from devices.triton_loss import add, class_of, entropy

RELU_COLUMNS = 128  # columns of a gradient that one program takes
RELU_ROWS = 32  # rows that it holds at a time
RELU_PASSES = 8  # how often it does at most
HEAD_NUMBERS = 4096  # numbers of a layer's inputs that one program of the head holds at a time
HEAD_PASSES = 8
LEAST_PROGRAMS = 512  # that stay for all multiprocessors if a program takes several passes
UPDATED_NUMBERS = 1024  # parameters that one program updates


# ---------------------------------------------------------------- ReLU


@triton.jit
def _relu_backward(
    gradient,
    output,
    target,
    bias_gradient,
    num_rows,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program takes COLUMNS columns of ROWS * PASSES rows, and adds their sums to the bias's."""
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(0).to(tl.int64) * (ROWS * PASSES)
    sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)  # over passes; over rows at the end
    for number in range(PASSES):
        row = begin + number * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < num_rows) & (m[None, :] < M)
        place = row * M + m[None, :]
        found = tl.load(gradient + place, mask=inside, other=0.0)
        is_zero = tl.load(output + place, mask=inside, other=0.0) <= 0  # it is not for nan
        kept = tl.where(is_zero, 0.0, found)
        tl.store(target + place, kept, mask=inside)
        sums += kept.to(tl.float32)
    tl.atomic_add(bias_gradient + m, tl.reduce(sums, 0, add), mask=m < M, sem="relaxed")


def _passes(num_programs: int, most: int) -> int:
    """How many passes a program takes, of programs that would be so many with one pass each."""
    passes = 1
    while passes < most and num_programs // (2 * passes) >= LEAST_PROGRAMS:
        passes *= 2
    return passes


def relu_backward(
    gradient: torch.Tensor, output: torch.Tensor, bias_gradient: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """The gradient of a ReLU's input, where its output is above 0, and its sum over rows.

    Args:
        gradient: (b, m) that of the output.
        output: (b, m) of the same type.
        bias_gradient: (m,) float32, to which the sums over rows are added, in any order.
        in_place: whether the result may overwrite `gradient`.
    """
    gradient = gradient.contiguous()
    num_rows, width = gradient.shape
    target = gradient if in_place else torch.empty_like(gradient)
    if num_rows:
        columns = min(RELU_COLUMNS, max(16, triton.next_power_of_2(width)))
        num_columns = triton.cdiv(width, columns)
        passes = _passes(triton.cdiv(num_rows, RELU_ROWS) * num_columns, RELU_PASSES)
        settings = {"M": width, "ROWS": RELU_ROWS, "PASSES": passes, "COLUMNS": columns}
        grid = (triton.cdiv(num_rows, RELU_ROWS * passes), num_columns)
        tensors = gradient, output, target, bias_gradient
        _relu_backward[grid](*tensors, num_rows, **settings)
    return target


# ---------------------------------------------------------------- the head


@triton.jit
def _logits(hidden, weight, bias, inside):
    """The inputs (rows, K) at `hidden` in float32, and the rows' logits (rows,)."""
    h = tl.load(hidden, mask=inside, other=0.0).to(tl.float32)
    return h, tl.reduce(h * weight[None, :], 1, add) + bias


@triton.jit
def _through_sigmoid(z, label, clamp):
    """The loss of logits and its gradient; probabilities are cut to [clamp, 1 - clamp]."""
    uncut = 1 / (1 + tl.exp(-z))
    p = tl.where(uncut < clamp, clamp, uncut)  # nan stays nan
    p = tl.where(p > 1 - clamp, 1 - clamp, p)
    loss, dp = entropy(p, label)
    dp = tl.where((uncut < clamp) | (uncut > 1 - clamp), 0.0, dp)
    return loss, dp * ((1 - uncut) * uncut)


@triton.jit
def _head(
    hidden,
    weight,
    bias,
    predicted,
    num_rows,
    K: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Probabilities alone."""
    k = tl.arange(0, BLOCK_K)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.load(weight + k, mask=k < K, other=0.0)
    inside = (row < num_rows)[:, None] & (k < K)[None, :]
    place = hidden + row[:, None] * PITCH + k[None, :]
    _, z = _logits(place, w, tl.load(bias), inside)
    tl.store(predicted + row, 1 / (1 + tl.exp(-z)), mask=row < num_rows)


@triton.jit
def _head_with_loss(
    hidden,
    weight,
    bias,
    label,
    label_weights,
    mask,
    scale,
    sums,
    hidden_gradient,
    weight_gradient,
    bias_gradient,
    hidden_bias_gradient,
    num_rows,
    divisor,
    clamp,
    HAS_MASK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RELU: tl.constexpr,
    K: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Forward and backward of the last layer; rows of K numbers are read once."""
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(0).to(tl.int64) * (ROWS * PASSES)
    w, b = tl.load(weight + k, mask=k < K, other=0.0), tl.load(bias)
    factor = (tl.load(scale) if HAS_SCALE else 1.0) / divisor
    loss_sums = tl.full((ROWS,), 0.0, tl.float32)
    bias_sums, weight_sums = loss_sums, tl.full((BLOCK_K,), 0.0, tl.float32)
    hidden_sums = weight_sums
    for number in range(PASSES):
        row = begin + number * ROWS + tl.arange(0, ROWS)
        is_row = row < num_rows
        inside = is_row[:, None] & (k < K)[None, :]
        place = row[:, None] * PITCH + k[None, :]
        h, z = _logits(hidden + place, w, b, inside)
        y = tl.load(label + row, mask=is_row, other=0.0)
        of_label = tl.load(label_weights + class_of(y), mask=is_row, other=0.0)
        if HAS_MASK:
            of_label *= tl.load(mask + row, mask=is_row, other=0.0)
        loss, dz = _through_sigmoid(z, y, clamp)
        loss_sums += tl.where(is_row, loss * of_label, 0.0)
        dz = tl.where(is_row, dz * of_label * factor, 0.0)
        bias_sums += dz
        weight_sums += tl.reduce(dz[:, None] * h, 0, add)
        dh = dz[:, None] * w[None, :]
        if HAS_RELU:
            dh = tl.where(h <= 0, 0.0, dh)
            hidden_sums += tl.reduce(dh, 0, add)
        tl.store(hidden_gradient + place, dh.to(hidden_gradient.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0), tl.reduce(loss_sums, 0, add))
    tl.atomic_add(bias_gradient, tl.reduce(bias_sums, 0, add), sem="relaxed")
    tl.atomic_add(weight_gradient + k, weight_sums, mask=k < K, sem="relaxed")
    if HAS_RELU:
        tl.atomic_add(hidden_bias_gradient + k, hidden_sums, mask=k < K, sem="relaxed")


def head_fits(width: int) -> bool:
    """Whether one program can hold a row of the last layer's inputs."""
    return triton.next_power_of_2(width) <= HEAD_NUMBERS


def _head_settings(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    width = weight.shape[1]
    block_k = max(16, triton.next_power_of_2(width))
    rows = max(1, min(32, HEAD_NUMBERS // block_k))
    return {"K": width, "PITCH": hidden.shape[1], "ROWS": rows, "BLOCK_K": block_k}


def head(hidden: torch.Tensor, parameters: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Probabilities (b, 1) float32 of a last layer of one output, without a loss.

    Args:
        hidden: (b, k) in 16 bits, or more columns, of zeros.
        parameters: weight (1, k) and bias (1,), float32.
    """
    hidden, (weight, bias) = hidden.contiguous(), parameters
    num_rows = len(hidden)
    predicted = weight.new_empty(num_rows, 1)
    if num_rows:
        settings = _head_settings(hidden, weight)
        grid = (triton.cdiv(num_rows, settings["ROWS"]),)
        _head[grid](hidden, weight, bias, predicted, num_rows, **settings)
    return predicted


def head_with_loss(
    hidden: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor],
    target: Any,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer of one output, sigmoid, cross entropy, and the gradients of all of them.

    Args:
        hidden: (b, k) in 16 bits, or more columns, of zeros.
        parameters: weight (1, k) and bias (1,), float32.
        target: what is to be predicted, a Target of model/layer_operators.py.
        gradients: those of weight (1, k), bias (1,) and of the biases of the layer before (k,), all
            float32, to which sums over rows are added, in any order. The last is None if `hidden`
            is not the output of a ReLU.

    Returns:
        The sum of the loss over rows (), float32, and the gradient of `hidden`'s shape and type,
        through the ReLU if there is one.
    """
    hidden, (weight, bias) = hidden.contiguous(), parameters
    num_rows, (of_weight, of_bias, of_hidden) = len(hidden), gradients
    has_zeros = hidden.shape[1] > weight.shape[1]
    gradient = torch.zeros_like(hidden) if has_zeros else torch.empty_like(hidden)
    settings = _head_settings(hidden, weight)
    passes = _passes(triton.cdiv(num_rows, settings["ROWS"]), HEAD_PASSES)
    num_programs = triton.cdiv(num_rows, settings["ROWS"] * passes)
    sums = weight.new_empty(num_programs)
    if num_rows:
        _head_with_loss[(num_programs,)](
            hidden,
            *parameters,
            target.label,
            target.label_weights,
            target.label if target.mask is None else target.mask,
            bias if target.scale is None else target.scale,
            sums,
            gradient,
            of_weight,
            of_bias,
            of_bias if of_hidden is None else of_hidden,
            num_rows,
            float(target.divisor),
            float(target.clamp),
            HAS_MASK=target.mask is not None,
            HAS_SCALE=target.scale is not None,
            HAS_RELU=of_hidden is not None,
            PASSES=passes,
            **settings,
        )
    return sums.sum(), gradient


# ---------------------------------------------------------------- the update


@triton.jit
def _update(
    values,
    gradients,
    lowered,
    places,
    broken,
    squares,
    lr,
    num_values,
    eps,
    LR_ON_DEVICE: tl.constexpr,
    ADAGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_values
    place = tl.load(places + n, mask=inside, other=0)
    gradient = tl.load(gradients + place, mask=inside, other=0.0)
    value = tl.load(values + n, mask=inside, other=0.0)
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    if ADAGRAD:
        square = tl.load(squares + n, mask=inside, other=0.0) + gradient * gradient
        tl.store(squares + n, square, mask=inside)
        gradient /= tl.sqrt_rn(square) + eps
    value -= rate * gradient
    tl.store(values + n, value, mask=inside)
    tl.store(lowered + place, value.to(lowered.dtype.element_ty), mask=inside)
    tl.store(gradients + place, tl.full((BLOCK,), 0.0, tl.float32), mask=inside)
    is_broken = tl.reduce((value * 0 != 0).to(tl.int32), 0, add)
    tl.store(broken, float("nan"), mask=is_broken > 0)


def update_parameters(
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    squares: torch.Tensor | None,
    lr: float | torch.Tensor,
    eps: float,
) -> None:
    """SGD's or Adagrad's step of all parameters, their copies in 16 bits, and gradients of 0 again.

    Args:
        buffers: values, gradients, lowered, places and broken of optim/flat_parameters.py's
            FlatParameters; all but places are changed.
        squares: (p,) float32 Adagrad's sums of squares, changed; None: SGD.
        lr: learning rate, a number or () on the device.
        eps: Adagrad's.
    """
    values = buffers[0]
    grid = (triton.cdiv(len(values), UPDATED_NUMBERS),)
    tensors = *buffers, values if squares is None else squares
    flags = {"LR_ON_DEVICE": isinstance(lr, torch.Tensor), "ADAGRAD": squares is not None}
    _update[grid](*tensors, lr, len(values), eps, BLOCK=UPDATED_NUMBERS, **flags)
