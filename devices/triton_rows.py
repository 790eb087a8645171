"""Kernels in Triton for rows of embedding tables: looking them up, and SGD's update.

model/embedding_matrix.py and optim/row_optimizers.py have the operators with the same results.
devices/triton_kernels.py says what is common to all kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from devices.triton_loss import add

LOOKUP_IDS = 16  # ids that one program looks up or updates
SUMMED_IDS = 32  # ids among which one program finds the equal ones
SUMMED_BYTES = 512  # of the longest gradient of which a program's registers hold so many


@triton.jit
def _look_up(
    weight,
    rows,
    out,
    num_ids,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + n, mask=n < num_ids, other=0).to(tl.int64)
    inside = (n < num_ids)[:, None] & (d < D)
    vectors = tl.load(weight + row[:, None] * D + d, mask=inside, other=0.0)
    tl.store(out + n[:, None] * D + d, vectors.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finite(gradient):
    """The gradient with 0 for what is not finite; nan becomes 0 too."""
    return tl.where(tl.abs(gradient) < float("inf"), gradient, 0.0)


@triton.jit
def _sgd(
    weight,
    rows,
    gradients,
    lr,
    num_ids,
    LR_ON_DEVICE: tl.constexpr,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row -= lr * gradient; the gradients of equal rows add up, in any order."""
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    n = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + n, mask=n < num_ids, other=0).to(tl.int64)
    inside = (n < num_ids)[:, None] & (d < D)
    gradient = tl.load(gradients + n[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    step = -rate * _finite(gradient)
    tl.atomic_add(weight + row[:, None] * D + d, step, mask=inside, sem="relaxed")


@triton.jit
def _sgd_summed(
    weight,
    rows,
    gradients,
    lr,
    num_ids,
    num_columns,
    LR_ON_DEVICE: tl.constexpr,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `_sgd`, but a program first sums equal rows among its IDS ids, which are of one column.

    With E the matrix that is 1 where ids i and j are equal, E times the gradients has the sum that
    belongs to each id; the first of equal ids adds it to the table.
    """
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    first = tl.program_id(0).to(tl.int64) * IDS
    i, j = tl.arange(0, IDS), tl.arange(0, IDS)
    n = (first + i) * num_columns + tl.program_id(1)
    other = (first + j) * num_columns + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + n, mask=n < num_ids, other=-1).to(tl.int64)
    other_row = tl.load(rows + other, mask=other < num_ids, other=-1).to(tl.int64)
    inside = (n < num_ids)[:, None] & (d < D)
    gradient = _finite(tl.load(gradients + n[:, None] * D + d, mask=inside, other=0.0))
    same = row[:, None] == other_row[None, :]
    sums = tl.dot(same.to(gradient.dtype), gradient, input_precision="ieee")
    came_before = same & (j[None, :] < i[:, None])
    is_first = tl.reduce(came_before.to(tl.int32), 1, add) == 0
    inside = inside & is_first[:, None]
    tl.atomic_add(weight + row[:, None] * D + d, -rate * sums, mask=inside, sem="relaxed")


def _settings(weight: torch.Tensor, num_ids: int, narrowest: int = 1) -> dict[str, Any]:
    """The constants that a kernel is compiled for; `narrowest` is the least width of its block."""
    dim = weight.shape[1]
    block_d = max(narrowest, triton.next_power_of_2(dim))
    return {"D": dim, "IDS": num_ids, "BLOCK_D": block_d}


def look_up(weight: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n,) of `weight` (R, D) float32 -> their vectors (n, D) in `dtype`."""
    out = weight.new_empty(len(rows), weight.shape[1], dtype=dtype)
    if len(rows):
        grid = (triton.cdiv(len(rows), LOOKUP_IDS),)
        _look_up[grid](weight, rows, out, len(rows), **_settings(weight, LOOKUP_IDS))
    return out


def sgd(
    weight: torch.Tensor,
    rows: torch.Tensor,
    gradients: torch.Tensor,
    lr: float | torch.Tensor,
    num_columns: int = 0,
) -> None:
    """weight[rows] -= lr * gradients, in place; gradients that are not finite count as 0.

    Args:
        weight: (R, D) float32, changed.
        rows: (n,); a row may come any number of times.
        gradients: (n, D) of any type.
        lr: learning rate, a number or a tensor () on the device.
        num_columns: T: ids at a distance of T are of one table, and SUMMED_IDS of them are searched
            for equal ones, whose gradients are summed before they are added to the row. A table of
            few rows then gets fewer additions, which a GPU does one after the other if they are to
            one row. 0: every gradient is added by itself.
    """
    if not len(rows):
        return
    tensors = weight, rows, gradients.contiguous(), lr, len(rows)
    on_device = isinstance(lr, torch.Tensor)
    if num_columns and weight.shape[1] * gradients.element_size() <= SUMMED_BYTES:
        num_groups = triton.cdiv(triton.cdiv(len(rows), num_columns), SUMMED_IDS)
        settings = _settings(weight, SUMMED_IDS, narrowest=16)
        kernel = _sgd_summed[(num_groups, num_columns)]
        kernel(*tensors, num_columns, LR_ON_DEVICE=on_device, **settings)
    else:
        kernel = _sgd[(triton.cdiv(len(rows), LOOKUP_IDS),)]
        kernel(*tensors, LR_ON_DEVICE=on_device, **_settings(weight, LOOKUP_IDS))
