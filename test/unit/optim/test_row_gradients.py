"""Gradients of rows are kept as sums, in memory that follows the rows and not the ids."""

import torch
from naive_embedding import draw_rows

from optim.row_gradients import (
    DenseRowGradients,
    SlottedRowGradients,
    SortedRowGradients,
    sum_duplicates,
)

NUM_ROWS = 40


def test_duplicates_are_summed_and_shapes_are_kept():
    rows, sums = sum_duplicates(
        torch.tensor([4, 0, 4, 2]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    )
    assert rows.shape == (4,) and sums.shape == (4, 1)
    total = torch.zeros(5, 1).index_add_(0, rows, sums)
    assert total.view(-1).tolist() == [2, 0, 4, 0, 4]


def test_a_cpu_keeps_one_sum_for_each_distinct_row():
    kept = SlottedRowGradients(NUM_ROWS, 3)
    total, seen = torch.zeros(NUM_ROWS, 3), set()
    for step in range(20):
        rows, gradients = draw_rows(17, 3, 100, step)
        kept.add(rows, gradients)
        seen.update(rows.tolist())
        total.index_add_(0, rows, gradients)
        assert len(kept) == len(seen)
    rows, sums = kept.take()
    assert sorted(rows.tolist()) == sorted(seen) and sums.shape == (17, 3)
    torch.testing.assert_close(sums, total[rows])
    assert len(kept) == 0


def test_memory_of_the_sums_is_kept_and_does_not_grow():
    """The first step decides, as later ones here touch as many rows."""
    kept, memory = SlottedRowGradients(NUM_ROWS, 16), set()
    for step in range(10):
        for batch in range(3):
            kept.add(*draw_rows(NUM_ROWS, 16, 300, 3 * step + batch))
        assert len(kept) == NUM_ROWS
        storage = kept.take()[1].untyped_storage()
        memory.add((storage.data_ptr(), storage.nbytes()))
    assert len(memory) == 1
    assert memory.pop()[1] <= 1.25 * NUM_ROWS * 16 * 4


def test_other_devices_keep_no_more_pairs_than_the_table_has_rows():
    kept, total = SortedRowGradients(NUM_ROWS), torch.zeros(NUM_ROWS, 3)
    for step in range(10):
        rows, gradients = draw_rows(NUM_ROWS, 3, NUM_ROWS - 3, step)
        kept.add(rows, gradients)
        total.index_add_(0, rows, gradients)
        assert len(kept) <= NUM_ROWS
    rows, sums = kept.take()
    assert len(rows) == len(sums) <= NUM_ROWS and len(kept) == 0
    torch.testing.assert_close(torch.zeros(NUM_ROWS, 3).index_add_(0, rows, sums), total)


def test_a_small_table_of_all_ranks_keeps_a_sum_for_every_row_in_the_same_memory():
    """What was taken is forgotten with the next gradients, or if the sums are asked for."""
    kept, memory = DenseRowGradients(torch.zeros(NUM_ROWS, 3)), set()
    for step in range(4):
        total = torch.zeros(NUM_ROWS, 3)
        for batch in range(2):
            rows, gradients = draw_rows(NUM_ROWS, 3, 100, 2 * step + batch)
            kept.add(rows, gradients)
            total.index_add_(0, rows, gradients)
        torch.testing.assert_close(kept.sums(), total)
        assert len(kept) == NUM_ROWS
        rows, sums = kept.take()
        assert rows.tolist() == list(range(NUM_ROWS))
        torch.testing.assert_close(sums, total)
        assert len(kept) == 0
        memory.add(sums.data_ptr())
    assert len(memory) == 1
    assert not kept.sums().any() and len(kept) == NUM_ROWS


def test_numbers_that_are_not_finite_are_not_summed():
    kept = DenseRowGradients(torch.zeros(3, 2))
    gradients = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [3.0, 4.0]])
    kept.add(torch.tensor([1, 1, 0]), gradients)
    assert kept.take()[1].tolist() == [[3, 4], [1, 2], [0, 0]]
