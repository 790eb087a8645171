"""Kernels in Triton for what a GPU does slowly as a chain of operators.

The module that calls a kernel has the operators that it replaces: they are its reference, and run
if there is no Triton.

TRITON_INTERPRET=1 in the environment makes Triton interpret the kernels on the CPU. It must be set
before this module is imported, which `devices.gpu.triton_kernels` does on first use. The kernels
call only the built-in part of triton.language: whether the rest is compiled or interpreted was
decided by the variable when Triton itself was imported.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from devices.gpu import padded_width

DECODE_ROWS = 32  # rows of a batch that one program decodes
MAX_VECTORS, MAX_NUMBERS = 128, 1 << 14  # the most that a program's registers hold of a row


# ---------------------------------------------------------------- dot interaction


@triton.jit
def _load_pooled(pooled, row, v, d, V: tl.constexpr, D: tl.constexpr):
    """The pooled vectors of a row (BLOCK_V, BLOCK_D) from 1 on, zeros at the end."""
    return tl.load(
        pooled + row * ((V - 1) * D) + (v - 1) * D + d,
        mask=(v > 0) & (v < V) & (d < D),
        other=0.0,
    )


@triton.jit
def _pair(i, j, ITSELF: tl.constexpr):
    """The number of pair (i, j) with i >= j, counting the lower triangle row by row."""
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
    """Each program takes one row: Z = V V', whose lower triangle is stored."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)[:, None]
    d = tl.arange(0, BLOCK_D)
    pooled_vectors = _load_pooled(pooled, row, v, d[None, :], V, D)
    first = tl.load(dense + row * D + d, mask=d < D, other=0.0)
    vectors = tl.where(v == 0, first[None, :], pooled_vectors)
    products = tl.dot(vectors, tl.trans(vectors), input_precision=PRECISION)
    begin = out + row * PADDED
    tl.store(begin + d, first, mask=d < D)
    j = tl.arange(0, BLOCK_V)[None, :]
    kept = (v < V) & (j <= v) if ITSELF else (v < V) & (j < v)
    tl.store(begin + D + _pair(v, j, ITSELF), products.to(out.dtype.element_ty), mask=kept)
    tl.store(begin + WIDTH + d, (d * 0).to(out.dtype.element_ty), mask=d < PADDED - WIDTH)


@triton.jit
def _dot_backward(
    gradient,
    dense,
    pooled,
    dense_gradient,
    pooled_gradient,
    V: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ITSELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program takes one row: V's gradient is S V, S the symmetric matrix of Z's gradients."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)[:, None]
    d = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_V)[None, :]
    paired = (v < V) & (j < V) if ITSELF else (v < V) & (j < V) & (v != j)
    pair = _pair(tl.maximum(v, j), tl.minimum(v, j), ITSELF)
    begin = gradient + row * PADDED
    # All loads come before the first use of one, so that their latencies are one. Those of a single
    # row come last: the compiler puts a barrier behind them.
    pooled_vectors = _load_pooled(pooled, row, v, d[None, :], V, D)
    symmetric = tl.load(begin + D + pair, mask=paired, other=0.0)
    first = tl.load(dense + row * D + d, mask=d < D, other=0.0)
    direct = tl.load(begin + d, mask=d < D, other=0.0)
    vectors = tl.where(v == 0, first[None, :], pooled_vectors)
    symmetric = tl.where(v == j, symmetric * 2, symmetric)  # d(v.v) = 2 v dv
    through_pairs = tl.dot(symmetric.to(vectors.dtype), vectors, input_precision=PRECISION)
    total = through_pairs + tl.where(v == 0, direct[None, :].to(tl.float32), 0.0)
    total = total.to(dense_gradient.dtype.element_ty)
    d = d[None, :]
    tl.store(dense_gradient + row * D + d + v, total, mask=(v == 0) & (d < D))
    others = pooled_gradient + row * ((V - 1) * D) + (v - 1) * D + d
    tl.store(others, total, mask=(v > 0) & (v < V) & (d < D))


def dot_fits(num_vectors: int, dim: int) -> bool:
    """Whether one program can hold a row's vectors and their products."""
    block_v, block_d = _dot_blocks(num_vectors, dim)
    return block_v <= MAX_VECTORS and max(block_d, block_v) * block_v <= MAX_NUMBERS


def dot_width(num_vectors: int, dim: int, itself: bool) -> tuple[int, int]:
    """Columns of the interaction's result: (without padding, with zeros up to `padded_width`)."""
    pairs = num_vectors * (num_vectors + 1 if itself else num_vectors - 1) // 2
    width = dim + pairs
    return width, padded_width(width)


def _dot_blocks(num_vectors: int, dim: int) -> tuple[int, int]:
    return triton.next_power_of_2(max(16, num_vectors)), triton.next_power_of_2(max(16, dim))


def _dot_settings(pooled: torch.Tensor, itself: bool) -> dict[str, Any]:
    """The constants that both kernels are compiled for."""
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
    """The fewest warps whose registers hold a row; without tensor cores it takes more of them."""
    if kind is torch.float32 and precision == "ieee":
        return 8
    numbers_per_warp = 1024 if kind is torch.float32 else 2048
    return max(1, min(8, block_v * max(block_v, block_d) // numbers_per_warp))


def dot_forward(dense: torch.Tensor, pooled: torch.Tensor, itself: bool) -> torch.Tensor:
    """(B, D) and (B, T, D) of one type -> (B, `padded_width` of D + pairs).

    Products are summed in float32; --tf32 decides how the factors of float32 products round.

    Args:
        dense: the first vector of each row.
        pooled: the other T = V - 1 vectors.
        itself: a vector is also paired with itself.
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
    """Gradients of `dense` and `pooled` from the gradient of `dot_forward`'s result."""
    gradient, dense, pooled = gradient.contiguous(), dense.contiguous(), pooled.contiguous()
    dense_gradient, pooled_gradient = torch.empty_like(dense), torch.empty_like(pooled)
    if len(dense):
        _dot_backward[(len(dense),)](
            gradient,
            dense,
            pooled,
            dense_gradient,
            pooled_gradient,
            **_dot_settings(pooled, itself),
        )
    return dense_gradient, pooled_gradient


# ---------------------------------------------------------------- batches


@triton.jit
def _decode(
    block,
    column_bytes,
    dense,
    ids,
    label,
    num_rows,
    row_bytes,
    shifts,
    NUM_DENSE: tl.constexpr,
    NUM_SPARSE: tl.constexpr,
    PITCH: tl.constexpr,
    HAS_SHIFTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)
    num_columns: tl.constexpr = 1 + NUM_DENSE + NUM_SPARSE
    is_column = column < num_columns
    offset = tl.load(column_bytes + column, mask=is_column, other=0)[None, :]
    width = tl.load(column_bytes + num_columns + column, mask=is_column, other=0)[None, :]
    if HAS_SHIFTS:
        is_id = is_column & (column > NUM_DENSE)
        shift = tl.load(shifts + column - 1 - NUM_DENSE, mask=is_id, other=0)[None, :]
    column = column[None, :]
    inside = (row < num_rows) & (column < num_columns)
    first = block + row * row_bytes + offset
    value = tl.load(first, mask=inside, other=0).to(tl.int32)
    value |= tl.load(first + 1, mask=inside & (width >= 2), other=0).to(tl.int32) << 8
    value |= tl.load(first + 2, mask=inside & (width == 4), other=0).to(tl.int32) << 16
    value |= tl.load(first + 3, mask=inside & (width == 4), other=0).to(tl.int32) << 24
    number = value.to(tl.float32)
    tl.store(label + row + column, number, mask=inside & (column == 0))
    # the columns after the last id are free to write the zeros after the logarithms
    is_dense = inside & (column >= 1) & (column <= NUM_DENSE)
    is_zero = (row < num_rows) & (column >= num_columns)
    is_zero = is_zero & (column < num_columns + PITCH - NUM_DENSE)
    place = tl.where(is_zero, NUM_DENSE + column - num_columns, column - 1)
    logarithm = tl.where(is_zero, 0.0, tl.log(number + 1)).to(dense.dtype.element_ty)
    tl.store(dense + row * PITCH + place, logarithm, mask=is_dense | is_zero)
    target = ids + row * NUM_SPARSE + column - 1 - NUM_DENSE
    if HAS_SHIFTS:
        value += shift
    tl.store(target, value, mask=inside & (column > NUM_DENSE))


def decode(
    block: torch.Tensor,
    column_bytes: torch.Tensor,
    num_dense: int,
    num_sparse: int,
    lower: torch.dtype | None = None,
    shifts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpack rows, and take log(x + 1) of their integers, in one pass.

    Args:
        block: (b, bytes of a row) uint8.
        column_bytes: (2, columns) int32: first byte and width of each column, in the order label,
            integers, ids.
        num_dense: integers in a row.
        num_sparse: ids in a row.
        lower: type of the logarithms, which then have zeros after them up to `padded_width`; None:
            float32, and no zeros.
        shifts: (num_sparse,) int32 that are added to the ids of each column; None: nothing is.

    Returns:
        Logarithms (b, num_dense) or wider, ids (b, num_sparse) int32, labels (b, 1) float32.
    """
    num_rows, row_bytes = block.shape
    pitch = num_dense if lower is None else padded_width(num_dense)
    dense = block.new_empty(num_rows, pitch, dtype=lower or torch.float32)
    ids = block.new_empty(num_rows, num_sparse, dtype=torch.int32)
    label = block.new_empty(num_rows, 1, dtype=torch.float32)
    if num_rows:
        grid = (triton.cdiv(num_rows, DECODE_ROWS),)
        columns = triton.next_power_of_2(1 + pitch + num_sparse)
        counts = {"NUM_DENSE": num_dense, "NUM_SPARSE": num_sparse, "COLUMNS": columns}
        _decode[grid](
            block,
            column_bytes,
            dense,
            ids,
            label,
            num_rows,
            row_bytes,
            column_bytes if shifts is None else shifts,
            PITCH=pitch,
            HAS_SHIFTS=shifts is not None,
            ROWS=DECODE_ROWS,
            **counts,
        )
    return dense, ids, label
