"""CPU kernels, compiled by numba, for what torch's operators do far slower than memory allows.

devices/threads.py sets how many threads they run on.
"""

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt

from common.compiled import compiler

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int32]


# sums may be reordered, but nan and infinity keep their meaning, as gradients are tested for them;
# with arcp, a process that compiles a kernel got other bits than one that loads it from the cache
FAST_MATH = {"reassoc", "contract", "nsz"}
kernel = compiler(fastmath=FAST_MATH, parallel=False)
parallel_kernel = compiler(fastmath=FAST_MATH, parallel=True)


def _arrays(*tensors: "Tensor") -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


# ---------------------------------------------------------------- rows of tables


def add_to_rows(
    target: "Tensor", rows: "Tensor", source: "Tensor", scale: float, num_parts: int = 0
) -> None:
    """target[rows[i]] += scale * source[i], in order of i; numbers that are not finite add nothing.

    Args:
        target: (R, D), changed.
        rows: (n,) int64; a row may come any number of times.
        source: (n, D).
        scale: factor of all numbers.
        num_parts: shares of the rows, each for one thread; 0: as many as there are threads.
    """
    arrays = _arrays(target, rows, source.contiguous())
    _add_to_rows(*arrays, np.float32(scale), num_parts or numba.get_num_threads())


@parallel_kernel
def _add_to_rows(
    target: Floats, rows: Ints, source: Floats, scale: np.float32, num_parts: int
) -> None:
    # each thread takes the rows whose hash falls into its part, so no thread waits for another,
    # and the order of the additions to a row does not depend on the number of threads
    for part in numba.prange(num_parts):
        for i in range(len(rows)):
            hashed = (np.uint64(rows[i]) * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)
            if (hashed * np.uint64(num_parts)) >> np.uint64(32) != np.uint64(part):
                continue
            row = rows[i]
            for d in range(source.shape[1]):
                value = source[i, d]
                target[row, d] += scale * value if abs(value) < np.inf else np.float32(0)


def assign_slots(
    index: "Tensor", slot_of: Slots, rows: "Tensor", count: int, slots: "Tensor"
) -> int:
    """Number rows in the order of their first appearance.

    Args:
        index: (n,) int64 rows.
        slot_of: (R,) slot of each row, -1 if it has none yet; changed.
        rows: (at least count + n,) row of each slot; changed.
        count: slots so far.
        slots: (n,) int64, written: the slot of each of `index`.

    Returns:
        The number of slots now.
    """
    ids, row_of, out = _arrays(index, rows, slots)
    return int(_assign_slots(ids, slot_of, row_of, count, out))


@kernel
def _assign_slots(index: Ints, slot_of: Slots, rows: Ints, count: int, slots: Ints) -> int:
    for i in range(len(index)):
        row = index[i]
        if slot_of[row] < 0:
            slot_of[row] = count
            rows[count] = row
            count += 1
        slots[i] = slot_of[row]
    return count


def sgd(weight: "Tensor", rows: "Tensor", sums: "Tensor", lr: float) -> None:
    """weight[rows[k]] -= lr * sums[k] for a weight (R, D), distinct rows (m,) and sums (m, D)."""
    _sgd(*_arrays(weight, rows, sums), np.float32(lr))


@parallel_kernel
def _sgd(weight: Floats, rows: Ints, sums: Floats, lr: np.float32) -> None:
    for k in numba.prange(len(rows)):
        for d in range(weight.shape[1]):
            weight[rows[k], d] -= lr * sums[k, d]


def adagrad(
    state: tuple["Tensor", "Tensor"], rows: "Tensor", sums: "Tensor", lr: float, eps: float
) -> None:
    """total += sums^2; weight -= lr * sums / (sqrt(total) + eps), in distinct rows.

    Args:
        state: weight and total, (R, D) each, changed.
        rows: (m,), distinct.
        sums: (m, D), the sum of each row's gradients.
        lr: learning rate.
        eps: keeps the quotient finite.
    """
    _adagrad(*_arrays(*state, rows, sums), np.float32(lr), np.float32(eps))


@parallel_kernel
def _adagrad(
    weight: Floats, total: Floats, rows: Ints, sums: Floats, lr: np.float32, eps: np.float32
) -> None:
    for k in numba.prange(len(rows)):
        row = rows[k]
        for d in range(weight.shape[1]):
            total[row, d] += sums[k, d] * sums[k, d]
            weight[row, d] -= lr * sums[k, d] / (np.sqrt(total[row, d]) + eps)


def row_wise_adagrad(
    state: tuple["Tensor", "Tensor"], rows: "Tensor", sums: "Tensor", lr: float, eps: float
) -> None:
    """As `adagrad`, but total (R,) has one number for each row: it sums means over D of sums^2."""
    _row_wise_adagrad(*_arrays(*state, rows, sums), np.float32(lr), np.float32(eps))


@parallel_kernel
def _row_wise_adagrad(
    weight: Floats, total: Floats, rows: Ints, sums: Floats, lr: np.float32, eps: np.float32
) -> None:
    for k in numba.prange(len(rows)):
        row = rows[k]
        squares = np.float32(0)
        for d in range(weight.shape[1]):
            squares += sums[k, d] * sums[k, d]
        total[row] += squares / np.float32(weight.shape[1])
        step = lr / (np.sqrt(total[row]) + eps)
        for d in range(weight.shape[1]):
            weight[row, d] -= step * sums[k, d]


# ---------------------------------------------------------------- dot interaction


def dot_products(vectors: "Tensor", itself: bool, out: "Tensor") -> None:
    """Copy each row's first vector, then write the products of pairs of its vectors.

    Args:
        vectors: (B, V, D).
        itself: a vector is also paired with itself.
        out: (B, D + pairs), written: pair (i, j) with j < i is column D + i(i-1)/2 + j, or with
            `itself` (j <= i) column D + i(i+1)/2 + j.
    """
    _dot_products(*_arrays(vectors, out), int(itself))


@parallel_kernel
def _dot_products(vectors: Floats, out: Floats, itself: int) -> None:
    for b in numba.prange(len(vectors)):
        _dot_products_of_row(vectors, b, itself, out)


@kernel
def _dot_products_of_row(vectors: Floats, b: int, itself: int, out: Floats) -> None:
    _, num_vectors, dim = vectors.shape
    out[b, :dim] = vectors[b, 0]
    column = dim
    for i in range(num_vectors):
        for j in range(i + itself):
            product = np.float32(0)
            for d in range(dim):
                product += vectors[b, i, d] * vectors[b, j, d]
            out[b, column] = product
            column += 1


def mirror_pairs(gradient: "Tensor", dim: int, itself: bool, out: "Tensor") -> None:
    """Write gradients of pairs as symmetric matrices.

    Args:
        gradient: (B, D + pairs), columns as in `dot_products`.
        dim: D.
        itself: as in `dot_products`; the diagonal is then twice the gradients, else 0.
        out: (B, V, V), written.
    """
    _mirror_pairs(*_arrays(gradient.contiguous(), out), dim, int(itself))


@parallel_kernel
def _mirror_pairs(gradient: Floats, out: Floats, dim: int, itself: int) -> None:
    for b in numba.prange(len(out)):
        _mirror_pairs_of_row(gradient, b, dim, itself, out)


@kernel
def _mirror_pairs_of_row(gradient: Floats, b: int, dim: int, itself: int, out: Floats) -> None:
    column = dim
    for i in range(out.shape[1]):
        out[b, i, i] = 0
        for j in range(i + itself):
            out[b, i, j] = out[b, j, i] = gradient[b, column]
            column += 1
        out[b, i, i] *= 2


# ---------------------------------------------------------------- quantized products

# Integers from 0 to 127 are kept less this number, because oneDNN's kernels add it again: where
# they sum in 16 bits, only integers below 128 keep the sums of two products exact.
INT8_SHIFT = 128


def to_int8(values: "Tensor", scale: float, zero_point: int, out: "Tensor") -> None:
    """Write values as integers from 0 to 127, less INT8_SHIFT.

    Args:
        values: (B, n); none is nan.
        scale: an integer is value / scale + zero_point, rounded half to even and clamped.
        zero_point: the integer of 0.
        out: (B, n) int8, written.
    """
    arrays = _arrays(values.contiguous(), out)
    _to_int8(*arrays, np.float32(1) / np.float32(scale), np.float32(zero_point))


@parallel_kernel
def _to_int8(
    values: Floats, out: npt.NDArray[np.int8], inverse_scale: np.float32, zero_point: np.float32
) -> None:
    for b in numba.prange(len(values)):
        for k in range(values.shape[1]):
            integer = np.rint(values[b, k] * inverse_scale + zero_point)
            clamped = max(min(integer, np.float32(127)), np.float32(0))
            out[b, k] = np.int8(np.int32(clamped) - INT8_SHIFT)


def from_sums(
    sums: "Tensor", of_zero_point: "Tensor", scale: float, bias: "Tensor", out: "Tensor"
) -> None:
    """out = (sums - of_zero_point) * scale + bias.

    Args:
        sums: (B, m) int32 sums of products of integers.
        of_zero_point: (m,) int32 sums that inputs of 0 would have.
        scale: what 1 of a sum stands for.
        bias: (m,).
        out: (B, m) float32, written.
    """
    _from_sums(*_arrays(sums, of_zero_point, bias, out), np.float32(scale))


@parallel_kernel
def _from_sums(sums: Slots, of_zero_point: Slots, bias: Floats, out: Floats, scale: float) -> None:
    for b in numba.prange(len(sums)):
        for m in range(sums.shape[1]):
            out[b, m] = np.float32(sums[b, m] - of_zero_point[m]) * scale + bias[m]


# ---------------------------------------------------------------- loss


def cross_entropy(
    predicted: "Tensor", label: "Tensor", label_weights: "Tensor", gradient: "Tensor"
) -> float:
    """Binary cross entropy in nats, summed over rows; logarithms are at least -100.

    Args:
        predicted: (b, 1) probabilities of label 1.
        label: (b, 1), 0 to 1.
        label_weights: (2,) weights of rows whose label, cut to an integer, is 0 or 1.
        gradient: (b, 1), written: the predictions' gradient, whose denominator p (1 - p) is at
            least 1e-12.
    """
    return float(_cross_entropy(*_arrays(predicted, label, label_weights, gradient)))


@kernel
def _cross_entropy(
    predicted: Floats, label: Floats, label_weights: Floats, gradient: Floats
) -> float:
    total = 0.0
    for b in range(len(predicted)):
        p, y = predicted[b, 0], label[b, 0]
        weight = label_weights[max(0, min(int(y), 1))]
        log_one, log_zero = np.log(p), np.log1p(-p)
        log_one = np.float32(-100) if log_one < -100 else log_one  # nan stays nan
        log_zero = np.float32(-100) if log_zero < -100 else log_zero
        total -= weight * (y * log_one + (np.float32(1) - y) * log_zero)
        variance = p * (np.float32(1) - p)
        variance = np.float32(1e-12) if variance < np.float32(1e-12) else variance
        gradient[b, 0] = weight * (p - y) / variance
    return total
