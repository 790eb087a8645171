"""Ids become rows of a rank's matrix; those whose rows other ranks have are looked up in zeros."""

import pytest
import torch
from naive_embedding import draw_bags

from devices.execution import Execution
from model.embedding_matrix import EmbeddingMatrix
from model.rows_of_ids import SPARE_ROWS, RowsOfIds
from optim.row_optimizers import TABLE_OPTIMIZERS
from optim.update import Update
from ranks.placement import Matrix, Part

CPU = torch.device("cpu")
NUM_IDS, DIM, BATCH = (40, 40, 9, 40, 12), 3, 400
ONE_EACH = pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])


def part(table, num_rows, begin, end, **function):
    return Part(Matrix(table, f"{table}.weight", num_rows, DIM, 0.1, **function), begin, end, 0)


WHOLE = [part(k, rows, 0, rows) for k, rows in enumerate(NUM_IDS)]
CUT = [
    part(0, 40, 0, 17),
    part(1, 40, 17, 40),
    part(2, 9, 0, 9),
    part(3, 40, 5, 6),
    part(4, 12, 0, 11),
]
OF_FUNCTIONS = [
    part(0, 10, 0, 10, divisor=4),
    part(1, 4, 0, 4, modulus=4),
    part(2, 9, 2, 7),
    part(3, 7, 3, 7, divisor=2, modulus=7),
    part(4, 3, 1, 2, divisor=5),
]
PARTS = pytest.mark.parametrize("parts", [WHOLE, CUT, OF_FUNCTIONS], ids=["whole", "cut", "of //"])


def naive_rows(parts, lists):
    """The row of each id, or None if it is on another rank."""
    begins, found = [0], []
    for one in parts:
        begins.append(begins[-1] + one.num_rows)
    for row in lists:
        for one, first, bag in zip(parts, begins, row, strict=False):
            for i in bag:
                place = i // one.matrix.divisor % (one.matrix.modulus or 10**9)
                is_here = one.begin <= place < one.end
                found.append(first + place - one.begin if is_here else None)
    return found, begins[-1]


@ONE_EACH
@PARTS
def test_rows_are_those_of_a_loop_over_ids_and_other_ranks_are_spread_over_spare_ones(
    parts, one_each
):
    bags, lists = draw_bags(NUM_IDS, BATCH, one_each)
    found = RowsOfIds(parts, CPU)(bags)
    wanted, num_rows = naive_rows(parts, lists)
    assert found.lengths is bags.lengths
    rows = found.ids.tolist()
    assert [row if row < num_rows else None for row in rows] == wanted
    spare = [row for row in rows if row >= num_rows]
    assert all(row < num_rows + SPARE_ROWS for row in spare)
    if spare:
        most = max(spare.count(row) for row in set(spare))
        assert most <= 4 * len(spare) / SPARE_ROWS + len(parts)
    assert bool(spare) == (parts is not WHOLE)


@ONE_EACH
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "plain"])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "at once"])
@pytest.mark.parametrize("optimizer", TABLE_OPTIMIZERS)
def test_rows_of_other_ranks_are_zeros_and_stay_zeros(optimizer, keeps, learned, one_each):
    """A bag's vector is the sum over the ids that are here; gradients of the others go nowhere."""
    matrix = EmbeddingMatrix(CUT, CPU, optimizer, learned, Execution(), SPARE_ROWS)
    num_rows = len(matrix.weight) - SPARE_ROWS
    matrix.weight[:num_rows].uniform_(-1, 1)
    rows_of_ids = RowsOfIds(CUT, CPU)
    for step in range(3):
        bags, lists = draw_bags(NUM_IDS, BATCH, one_each, step)
        rows, _ = naive_rows(CUT, lists)
        weights = matrix.pooling[:, 0] if learned else torch.ones(len(matrix.weight))
        sizes = [len(bag) for row in lists for bag in row]
        wanted, begin = [], 0
        for size in sizes:
            here = [row for row in rows[begin : begin + size] if row is not None]
            wanted.append((matrix.weight[here] * weights[here, None]).sum(0))
            begin += size
        before = matrix.weight.clone()
        update = Update(0.1, rows_now=not keeps)
        vectors = matrix.look_up(rows_of_ids(bags), update)
        torch.testing.assert_close(vectors.detach(), torch.stack(wanted))
        vectors.backward(torch.randn(vectors.shape))
        if keeps:
            matrix.apply_kept(update)
        assert not matrix.weight[num_rows:].any()
        is_changed = (matrix.weight != before).any(1)
        assert set(is_changed.nonzero().view(-1).tolist()) == {
            row for row in rows if row is not None
        }


@pytest.mark.parametrize("optimizer", TABLE_OPTIMIZERS)
def test_what_is_saved_of_a_part_has_no_spare_rows(optimizer):
    matrix = EmbeddingMatrix(CUT, CPU, optimizer, True, Execution(), SPARE_ROWS)
    for name, tensor in matrix.row_tensors().items():
        tensor.copy_(torch.arange(len(tensor)).view(-1, *[1] * (tensor.dim() - 1)))
        saved = torch.cat([matrix.part_view(name, one) for one in CUT])
        assert torch.equal(saved, tensor[: sum(one.num_rows for one in CUT)])
