"""Quantized rows are those of the formulas, each within its own range, and are summed over bags."""

import numpy as np
import pytest
import torch
from conftest import at
from naive_embedding import bags_of, draw_bags
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import RankError
from model import quantized_matrix
from model.batch import Bags
from model.quantized_matrix import QuantizedMatrix, bytes_of_row
from model.rows_of_ids import RowsOfIds
from ranks.placement import Matrix, Part

NUM_ROWS = (7, 1, 30, 100)


def parts_of(num_rows, dim, begin=0):
    return [
        Part(Matrix(table, f"{table}.weight", begin + rows, dim, 0.1), begin, begin + rows, 0)
        for table, rows in enumerate(num_rows)
    ]


def look_up(matrix, bags):
    """Bags of ids of the parts' tables -> pooled vectors."""
    return matrix.look_up(RowsOfIds(matrix.parts, torch.device("cpu"))(bags), None)


def draw_weight(num_rows, dim):
    """Rows of very different ranges, some constant or zero."""
    random = np.random.default_rng(4)
    weight = random.normal(size=(sum(num_rows), dim))
    weight *= 10 ** random.uniform(-2, 2, (len(weight), 1))
    weight[3], weight[5] = 0, -0.25
    return weight.astype(np.float32)


def naive_rows(weight, bits):
    """What quantized rows stand for, by the formulas: offset + scale * whole number."""
    low = weight.min(1, keepdims=True)
    if bits == 4:  # a row's scale and offset are float16
        low = low.astype(np.float16).astype(np.float32)
    span = weight.max(1, keepdims=True) - low
    scale = span / np.float32(2**bits - 1)
    if bits == 4:
        scale = scale.astype(np.float16).astype(np.float32)
    steps = (weight - low) / np.where(scale == 0, 1, scale)
    return low + scale * np.clip(np.rint(steps), 0, 2**bits - 1)


def naive_sums(rows, num_rows, lists):
    """(B * P, D): the sums of the rows in each bag."""
    begins = np.cumsum([0, *num_rows])
    sums = [rows[[begins[p] + i for i in bag]].sum(0) for row in lists for p, bag in enumerate(row)]
    return torch.from_numpy(np.stack(sums).astype(np.float32))


@pytest.mark.parametrize("one_each", [True, False], ids=["one id", "bags"])
@pytest.mark.parametrize("dim", [1, 5, 16, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_sums_over_bags_are_those_of_rows_quantized_by_the_formulas(bits, dim, one_each):
    weight = draw_weight(NUM_ROWS, dim)
    matrix = QuantizedMatrix(torch.from_numpy(weight), parts_of(NUM_ROWS, dim), bits)
    bags, lists = draw_bags(NUM_ROWS, 50, one_each)
    got = look_up(matrix, bags)
    want = naive_sums(naive_rows(weight.astype(np.float64), bits), NUM_ROWS, lists)
    assert got.shape == (200, dim) and got.is_contiguous()
    for k in range(len(want)):  # as rows differ in size
        size = max(want[k].abs().max().item(), 1e-6)
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=1e-5 * size, msg=at(f"bag {k}"))


@pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_rows_count_in_sums_over_bags(bits, one_each):
    """Learned pooling: its weights stay float32."""
    weight = torch.from_numpy(draw_weight(NUM_ROWS, 16))
    pooling = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(2)) + 0.5
    bags, lists = draw_bags(NUM_ROWS, 20, one_each)
    got = look_up(QuantizedMatrix(weight, parts_of(NUM_ROWS, 16), bits, pooling), bags)
    plain = QuantizedMatrix(weight, parts_of(NUM_ROWS, 16), bits)
    begins = np.cumsum([0, *NUM_ROWS])
    want = [
        sum(
            (
                look_up(
                    plain,
                    bags_of([[[i] if t == table else [0] for t in range(len(NUM_ROWS))]], True),
                )[table]
                * pooling[begins[table] + i]
                for i in bag
            ),
            torch.zeros(16),
        )
        for row in lists
        for table, bag in enumerate(row)
    ]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_is_off_by_half_a_step_of_its_row_at_most(bits):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    matrix = QuantizedMatrix(weight, parts_of([40], 64), bits)
    got = look_up(matrix, bags_of([[[i]] for i in range(40)], one_each=True))
    step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    assert ((got - weight).abs().amax(1) <= 0.51 * step + 1e-3 * (bits == 4)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_may_be_int32_and_a_part_may_begin_in_the_middle_of_its_table(bits):
    weight = torch.from_numpy(draw_weight(NUM_ROWS, 16))
    bags, _ = draw_bags(NUM_ROWS, 9, one_each=True)
    plain = QuantizedMatrix(weight, parts_of(NUM_ROWS, 16), bits)
    rows = RowsOfIds(plain.parts, torch.device("cpu"))(bags)
    want = plain.look_up(rows, None)
    assert torch.equal(plain.look_up(Bags(rows.ids.int()), None), want)
    shifted = QuantizedMatrix(weight, parts_of(NUM_ROWS, 16, begin=3), bits)
    assert torch.equal(look_up(shifted, Bags((bags.ids + 3).int())), want)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("one_each", [True, False])
def test_without_bags_there_are_no_vectors_and_empty_bags_have_zeros(bits, one_each):
    some = QuantizedMatrix(torch.ones(5, 6), parts_of([5], 6), bits)
    ids = torch.zeros(0, dtype=torch.int32)
    lengths = None if one_each else torch.zeros(0, 1, dtype=torch.int64)
    assert some.look_up(Bags(ids, lengths), None).shape == (0, 6)
    if not one_each:
        empty = some.look_up(Bags(ids, torch.zeros(3, 1, dtype=torch.int64)), None)
        assert empty.shape == (3, 6) and not empty.any()


def test_bytes_are_those_of_the_packed_rows_and_4_bits_are_7_times_smaller_at_64():
    weight = torch.zeros(10, 64)
    for bits in (8, 4):
        matrix = QuantizedMatrix(weight, parts_of([10], 64), bits)
        assert matrix.weight.dtype == torch.uint8
        assert matrix.weight.nbytes == 10 * bytes_of_row(64, bits)
    assert weight.nbytes / matrix.weight.nbytes >= 7
    assert weight.nbytes == 10 * bytes_of_row(64, 32)


class Made(TorchDispatchMode):
    """Notes the bytes of each tensor that an operator makes, by its address."""

    def __init__(self):
        super().__init__()
        self.bytes_at = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                self.bytes_at[address] = max(storage.nbytes(), self.bytes_at.get(address, 0))
        return made


@pytest.mark.parametrize("dim", [64, 63])
@pytest.mark.parametrize("bits", [8, 4])
def test_beside_table_and_integers_there_is_only_a_piece(bits, dim):
    weight = torch.ones(100_000, dim)  # 25 MB
    with Made() as made:
        matrix = QuantizedMatrix(weight, parts_of([60_000, 40_000], dim), bits)
    for kept in (weight, matrix.weight):
        assert made.bytes_at.pop(kept.untyped_storage().data_ptr()) == kept.nbytes
    assert 0 < max(made.bytes_at.values()) <= 4 * quantized_matrix.VALUES_PER_PIECE * 1.02


def test_pieces_of_any_size_are_the_same_rows(monkeypatch):
    weight = torch.from_numpy(draw_weight(NUM_ROWS, 16))
    whole = QuantizedMatrix(weight, parts_of(NUM_ROWS, 16), 8).weight
    for values in (1, 16 * 7, 16 * 30):
        monkeypatch.setattr(quantized_matrix, "VALUES_PER_PIECE", values)
        assert torch.equal(QuantizedMatrix(weight, parts_of(NUM_ROWS, 16), 8).weight, whole)


@pytest.mark.parametrize(
    ("bits", "value"), [(4, 7e4), (4, float("nan")), (8, float("inf")), (8, -3e38)]
)
def test_numbers_that_a_row_cannot_hold_are_an_error_that_names_the_table(bits, value):
    weight = torch.zeros(sum(NUM_ROWS), 4)
    weight[10, 2] = value
    with pytest.raises(RankError, match=f"with-bit={bits}: table 2 has numbers from .* expected"):
        QuantizedMatrix(weight, parts_of(NUM_ROWS, 4), bits)
