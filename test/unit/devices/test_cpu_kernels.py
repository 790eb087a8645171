"""Threads share the rows of a table so that each is added to once, in one order.

The kernels' numbers are tested beside their callers: test_row_optimizers.py, test_interaction.py,
test_losses.py.
"""

import pytest
import torch
from naive_embedding import draw_rows

from devices import cpu_kernels


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_sums_of_rows_are_the_same_bits_on_any_number_of_threads(num_parts):
    found = []
    for parts in (1, num_parts):
        target = torch.zeros(50, 7)
        cpu_kernels.add_to_rows(target, *draw_rows(50, 7, 20_000, seed=5), -0.37, parts)
        found.append(target)
    assert torch.equal(*found)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 61])
def test_each_row_is_added_once_whatever_the_parts(num_parts):
    """No row is lost between two threads, and none is added by both."""
    rows = torch.arange(70_000).repeat(2)
    target = torch.zeros(70_000, 1)
    cpu_kernels.add_to_rows(target, rows, torch.ones(140_000, 1), 1.0, num_parts)
    assert (target == 2).all()
