"""Kernels in Triton for what a GPU does slowly as a chain of operators.

Each has its operators beside it in the module that calls it: the reference, and what is used where
Triton is not. TRITON_INTERPRET=1 in the environment makes Triton interpret them on the CPU; it must
be set before this module is imported, which `devices.triton_kernels` does on first use. (Of
triton.language only what is built in is used: the rest of it is compiled or interpreted as
Triton's own import found the variable.)
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOOKUP_ROWS = 16  # ids of a program
DECODE_ROWS = 32  # rows of a batch of a program
LOSS_ROWS = 256  # rows of a batch of a program
MOST_VECTORS, MOST_NUMBERS = 128, 1 << 14  # of a row, which one program holds in registers
ALIGNED = 8  # numbers; tensor cores take rows of 16-bit numbers that begin at multiples of 16 bytes


# ---------------------------------------------------------------- dot interaction


@triton.jit
def _load_vectors(dense, pooled, row, v, d, V: tl.constexpr, D: tl.constexpr):
    """The vectors of a row (BLOCK_V, BLOCK_D): the dense one first, zeros at the end."""
    of_dense = tl.load(dense + row * D + d, mask=(v == 0) & (d < D), other=0.0)
    at = pooled + row * ((V - 1) * D) + (v - 1) * D + d
    return of_dense + tl.load(at, mask=(v > 0) & (v < V) & (d < D), other=0.0)


@triton.jit
def _pair(i, j, ITSELF: tl.constexpr):
    """The number of pair (i, j), i >= j, row by row of the lower triangle."""
    shift: tl.constexpr = 1 if ITSELF else -1
    return i * (i + shift) // 2 + j


@triton.jit
def _dot_forward(
    dense,
    pooled,
    out,
    V: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ITSELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program: Z = V V', of which the lower triangle is kept."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)[:, None]
    d = tl.arange(0, BLOCK_D)
    vectors = _load_vectors(dense, pooled, row, v, d[None, :], V, D)
    products = tl.dot(vectors, tl.trans(vectors), input_precision=PRECISION)
    begin = out + row * PADDED
    tl.store(begin + d, tl.load(dense + row * D + d, mask=d < D, other=0.0), mask=d < D)
    j = tl.arange(0, BLOCK_V)[None, :]
    kept = (v < V) & (j <= v) if ITSELF else (v < V) & (j < v)
    tl.store(begin + D + _pair(v, j, ITSELF), products.to(out.dtype.element_ty), mask=kept)
    tl.store(begin + WIDTH + d, (d * 0).to(out.dtype.element_ty), mask=d < PADDED - WIDTH)


@triton.jit
def _dot_backward(
    gradient,
    dense,
    pooled,
    of_dense,
    of_pooled,
    V: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ITSELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program: V's gradient is S V, S the symmetric matrix of Z's gradients."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    vectors = _load_vectors(dense, pooled, row, v, d, V, D)
    j = tl.arange(0, BLOCK_V)[None, :]
    paired = (v < V) & (j < V) if ITSELF else (v < V) & (j < V) & (v != j)
    pair = _pair(tl.maximum(v, j), tl.minimum(v, j), ITSELF)
    begin = gradient + row * PADDED
    symmetric = tl.load(begin + D + pair, mask=paired, other=0.0)
    symmetric = tl.where(v == j, symmetric * 2, symmetric)  # d(v.v) = 2 v dv
    found = tl.dot(symmetric.to(vectors.dtype), vectors, input_precision=PRECISION)
    direct = tl.load(begin + d, mask=(v == 0) & (d < D), other=0.0)
    found = (found + direct.to(tl.float32)).to(of_dense.dtype.element_ty)
    tl.store(of_dense + row * D + d + v, found, mask=(v == 0) & (d < D))
    at = of_pooled + row * ((V - 1) * D) + (v - 1) * D + d
    tl.store(at, found, mask=(v > 0) & (v < V) & (d < D))


def dot_fits(num_vectors: int, dim: int) -> bool:
    """One program can hold a row's vectors and their products."""
    block_v, block_d = _dot_blocks(num_vectors, dim)
    return block_v <= MOST_VECTORS and max(block_d, block_v) * block_v <= MOST_NUMBERS


def dot_width(num_vectors: int, dim: int, itself: bool) -> tuple[int, int]:
    """Columns of the interaction's result: those that mean something, and with zeros after them."""
    pairs = num_vectors * (num_vectors + 1 if itself else num_vectors - 1) // 2
    width = dim + pairs
    return width, -(-width // ALIGNED) * ALIGNED


def _dot_blocks(num_vectors: int, dim: int) -> tuple[int, int]:
    return triton.next_power_of_2(max(16, num_vectors)), triton.next_power_of_2(max(16, dim))


def _dot_settings(pooled: torch.Tensor, itself: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    num_vectors, dim = pooled.shape[1] + 1, pooled.shape[2]
    block_v, block_d = _dot_blocks(num_vectors, dim)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {
        "V": num_vectors,
        "D": dim,
        "PADDED": dot_width(num_vectors, dim, itself)[1],
        "ITSELF": itself,
        "PRECISION": precision,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "num_warps": _dot_warps(pooled.dtype, precision, block_v, block_d),
    }


def _dot_warps(kind: torch.dtype, precision: str, block_v: int, block_d: int) -> int:
    """As few as hold the numbers in registers; without tensor cores each holds more of them."""
    if kind is torch.float32 and precision == "ieee":
        return 8
    of_a_warp = 1024 if kind is torch.float32 else 2048
    return max(1, min(8, block_v * max(block_v, block_d) // of_a_warp))


def dot_forward(dense: torch.Tensor, pooled: torch.Tensor, itself: bool) -> torch.Tensor:
    """(B, D) and (B, T, D) of one type -> (B, D + pairs + zeros up to a multiple of ALIGNED).

    Products are summed in float32, those of float32 as --tf32 says.

    Args:
        dense: the first vectors.
        pooled: the other T = V - 1 of each row.
        itself: pairs of a vector with itself count too.
    """
    dense, pooled = dense.contiguous(), pooled.contiguous()
    settings = _dot_settings(pooled, itself)
    width, padded = dot_width(settings["V"], settings["D"], itself)
    out = dense.new_empty(len(dense), padded)
    if len(dense):
        _dot_forward[(len(dense),)](dense, pooled, out, WIDTH=width, **settings)
    return out


def dot_backward(
    gradient: torch.Tensor, dense: torch.Tensor, pooled: torch.Tensor, itself: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `dense` and `pooled` from that of what `dot_forward` gave for them."""
    gradient, dense, pooled = gradient.contiguous(), dense.contiguous(), pooled.contiguous()
    of_dense, of_pooled = torch.empty_like(dense), torch.empty_like(pooled)
    if len(dense):
        _dot_backward[(len(dense),)](
            gradient, dense, pooled, of_dense, of_pooled, **_dot_settings(pooled, itself)
        )
    return of_dense, of_pooled


# ---------------------------------------------------------------- embedding


@triton.jit
def _look_up(
    weight,
    rows,
    out,
    num_ids,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + at, mask=at < num_ids, other=0).to(tl.int64)
    inside = (at < num_ids)[:, None] & (d < D)
    vectors = tl.load(weight + row[:, None] * D + d, mask=inside, other=0.0)
    tl.store(out + at[:, None] * D + d, vectors.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sgd(
    weight,
    rows,
    gradients,
    lr,
    num_ids,
    LR_ON_DEVICE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row -= lr * gradient; equal rows add up, in any order."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(rows + at, mask=at < num_ids, other=0).to(tl.int64)
    inside = (at < num_ids)[:, None] & (d < D)
    found = tl.load(gradients + at[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    found = tl.where(tl.abs(found) < float("inf"), found, 0.0)  # nan is not below it either
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    tl.atomic_add(weight + row[:, None] * D + d, -rate * found, mask=inside, sem="relaxed")


def _id_settings(weight: torch.Tensor) -> dict[str, Any]:
    dim = weight.shape[1]
    return {"D": dim, "ROWS": LOOKUP_ROWS, "BLOCK_D": triton.next_power_of_2(dim)}


def look_up(weight: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n,) of `weight` (R, D) float32, as (n, D) of another type."""
    out = weight.new_empty(len(rows), weight.shape[1], dtype=dtype)
    if len(rows):
        grid = (triton.cdiv(len(rows), LOOKUP_ROWS),)
        _look_up[grid](weight, rows, out, len(rows), **_id_settings(weight))
    return out


def sgd(
    weight: torch.Tensor, rows: torch.Tensor, gradients: torch.Tensor, lr: float | torch.Tensor
) -> None:
    """weight[rows] -= lr * gradients, in place; what is not finite counts as 0.

    Args:
        weight: (R, D) float32.
        rows: (n,), any of them several times.
        gradients: (n, D) of any type.
        lr: a number, or one on the device.
    """
    if len(rows):
        grid = (triton.cdiv(len(rows), LOOKUP_ROWS),)
        on_device = isinstance(lr, torch.Tensor)
        gradients = gradients.contiguous()
        settings = _id_settings(weight)
        _sgd[grid](weight, rows, gradients, lr, len(rows), LR_ON_DEVICE=on_device, **settings)


# ---------------------------------------------------------------- loss


@triton.jit
def _cross_entropy(
    predicted,
    label,
    weights,
    counts,
    gradient,
    sums,
    num_rows,
    HAS_COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    p = tl.load(predicted + row, mask=inside, other=0.5)
    y = tl.load(label + row, mask=inside, other=0.0)
    is_one = tl.minimum(tl.maximum(y.to(tl.int32), 0), 1)
    weight = tl.load(weights + is_one, mask=inside, other=0.0)
    if HAS_COUNTS:
        weight *= tl.load(counts + row, mask=inside, other=0.0)
    # written so that nan stays nan: of two numbers of which one is nan, maximum takes the other
    of_one, of_zero = tl.log(p), _log1p(-p)
    of_one = tl.where(of_one < -100, -100.0, of_one)
    of_zero = tl.where(of_zero < -100, -100.0, of_zero)
    loss = -(of_zero + y * (of_one - of_zero)) * weight
    tl.store(sums + tl.program_id(0), tl.reduce(tl.where(inside, loss, 0.0), 0, _add))
    variance = (1 - p) * p
    variance = tl.where(variance < 1e-12, 1e-12, variance)
    tl.store(gradient + row, (p - y) / variance * weight, mask=inside)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _log1p(x):
    """log(1 + x) without the loss of a small x's digits (Goldberg, 1991, theorem 4)."""
    one = 1 + x
    exact = one == 1
    return tl.where(exact, x, tl.log(one) * (x / tl.where(exact, 1.0, one - 1)))


def cross_entropy(
    predicted: torch.Tensor,
    label: torch.Tensor,
    of_label: torch.Tensor,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross entropy, summed over rows, and its gradient (b, 1): losses._cross_entropy's.

    Args:
        predicted: (b, 1) float32.
        label: (b, 1) float32.
        of_label: (2,) weights of labels 0 and 1.
        counts: (b, 1) 1 for rows that count, else 0; None: all count.
    """
    num_rows = len(predicted)
    gradient = torch.empty_like(predicted)
    grid = (triton.cdiv(num_rows, LOSS_ROWS),)
    sums = predicted.new_zeros(grid)
    if num_rows:
        tensors = (predicted, label, of_label, predicted if counts is None else counts)
        settings = {"HAS_COUNTS": counts is not None, "ROWS": LOSS_ROWS}
        _cross_entropy[grid](*tensors, gradient, sums, num_rows, **settings)
    return sums.sum(), gradient


# ---------------------------------------------------------------- batches


@triton.jit
def _decode(
    block,
    places,
    dense,
    ids,
    label,
    num_rows,
    row_bytes,
    NUM_DENSE: tl.constexpr,
    NUM_SPARSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)
    num_columns: tl.constexpr = 1 + NUM_DENSE + NUM_SPARSE
    offset = tl.load(places + column, mask=column < num_columns, other=0)[None, :]
    width = tl.load(places + num_columns + column, mask=column < num_columns, other=0)[None, :]
    column = column[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = block + row * row_bytes + offset
    value = tl.load(at, mask=inside, other=0).to(tl.int32)
    value |= tl.load(at + 1, mask=inside & (width >= 2), other=0).to(tl.int32) << 8
    value |= tl.load(at + 2, mask=inside & (width == 4), other=0).to(tl.int32) << 16
    value |= tl.load(at + 3, mask=inside & (width == 4), other=0).to(tl.int32) << 24
    number = value.to(tl.float32)
    tl.store(label + row + column, number, mask=inside & (column == 0))
    is_dense = inside & (column >= 1) & (column <= NUM_DENSE)
    tl.store(dense + row * NUM_DENSE + column - 1, tl.log(number + 1), mask=is_dense)
    at = ids + row * NUM_SPARSE + column - 1 - NUM_DENSE
    tl.store(at, value, mask=inside & (column > NUM_DENSE))


def decode(
    block: torch.Tensor, places: torch.Tensor, num_dense: int, num_sparse: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows as log(x + 1) of the integers, ids and labels, in one pass.

    Args:
        block: (b, bytes of a row) uint8.
        places: (2, columns) int32: first byte and width of each column: label, integers, ids.
        num_dense: integers a row.
        num_sparse: ids a row.

    Returns:
        (b, num_dense) float32, (b, num_sparse) int32, (b, 1) float32.
    """
    num_rows, row_bytes = block.shape
    dense = block.new_empty(num_rows, num_dense, dtype=torch.float32)
    ids = block.new_empty(num_rows, num_sparse, dtype=torch.int32)
    label = block.new_empty(num_rows, 1, dtype=torch.float32)
    if num_rows:
        grid = (triton.cdiv(num_rows, DECODE_ROWS),)
        columns = triton.next_power_of_2(1 + num_dense + num_sparse)
        counts = {"NUM_DENSE": num_dense, "NUM_SPARSE": num_sparse, "COLUMNS": columns}
        _decode[grid](
            block, places, dense, ids, label, num_rows, row_bytes, ROWS=DECODE_ROWS, **counts
        )
    return dense, ids, label
