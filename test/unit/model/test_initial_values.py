"""Initial values are those of one stream, or of the matrices' own, whoever holds them."""

import math

import numpy as np
import pytest
import torch

from common.shares import split_evenly
from model import initial_values
from model.compression import MixedDimensions, NoCompression
from model.initial_values import draw_in_order, draw_seeded
from ranks.placement import Part

TABLES = MixedDimensions(8, 20, 0.3, False).make_tables([7, 500, 61])
MATRICES = [matrix for table in TABLES for matrix in table.matrices]


def drawn(draw, num_ranks=1):
    """The matrices, cut into shares for so many ranks, drawn rank by rank and put together."""
    ranks = [[] for _ in range(num_ranks)]
    for matrix in MATRICES:
        end = 0
        for rank, num_rows in enumerate(split_evenly(matrix.num_rows, num_ranks)):
            begin, end = end, end + num_rows
            view = torch.full((num_rows, matrix.dim), math.nan)
            ranks[rank].append((matrix, [(Part(matrix, begin, end, rank), view)]))
    for held in ranks:
        draw(held)
    return [torch.cat([held[k][1][0][1] for held in ranks]) for k in range(len(MATRICES))]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(initial_values, "VALUES_PER_DRAW", 300)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_one_stream_draws_matrix_by_matrix(num_ranks):
    def draw(held):
        np.random.seed(7)
        draw_in_order(held)

    found = drawn(draw, num_ranks)
    np.random.seed(7)
    for matrix, values in zip(MATRICES, found, strict=True):
        size = (matrix.num_rows, matrix.dim)
        wanted = np.random.uniform(-matrix.bound, matrix.bound, size).astype(np.float32)
        assert np.array_equal(values.numpy(), wanted)


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_seeded_values_do_not_depend_on_who_holds_them(num_ranks):
    alone = drawn(lambda held: draw_seeded(held, 5))
    for one, other in zip(alone, drawn(lambda held: draw_seeded(held, 5), num_ranks), strict=True):
        assert torch.equal(one, other)
    state = np.random.get_state()[1].copy()
    other = drawn(lambda held: draw_seeded(held, 6))
    assert not any(torch.equal(one, two) for one, two in zip(alone, other, strict=True))
    assert np.array_equal(state, np.random.get_state()[1])  # the MLPs' numbers come from there


def test_seeded_values_fill_the_bounds_evenly_and_differ_from_piece_to_piece():
    found = drawn(lambda held: draw_seeded(held, 5))
    for matrix, values in zip(MATRICES, found, strict=True):
        assert float(values.abs().max()) <= matrix.bound
        if values.numel() > 400:
            assert abs(float(values.mean())) < 0.1 * matrix.bound
            assert float(values.std()) == pytest.approx(matrix.bound / math.sqrt(3), rel=0.1)
        assert len(values.unique()) > 0.99 * values.numel()
    shares = [(values / one.bound).flatten() for values, one in zip(found, MATRICES, strict=True)]
    assert len(torch.cat(shares).unique()) > 0.99 * sum(map(len, shares))


def test_a_rank_draws_what_it_holds_and_the_rest_of_the_pieces_at_its_ends(monkeypatch):
    sizes = []
    uniform = torch.Tensor.uniform_

    def counted(self, *words, **more):
        sizes.append(self.numel())
        return uniform(self, *words, **more)

    monkeypatch.setattr(torch.Tensor, "uniform_", counted)
    (matrix,) = NoCompression(10).make_tables([3000])[0].matrices
    view = torch.zeros(1000, 10)
    draw_seeded([(matrix, [(Part(matrix, 1010, 2010, 1), view)])], 5)
    assert max(sizes) == 300 and 10_000 <= sum(sizes) <= 10_000 + 2 * 300
    assert float(view.abs().min(1).values.max()) > 0
