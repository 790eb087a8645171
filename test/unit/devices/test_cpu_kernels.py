"""Threads share the rows of a table so that each is added to once, in one order.

The kernels' numbers are tested beside their callers: test_row_optimizers.py, test_interaction.py,
test_losses.py.
"""

import os
import sys

import pytest
import torch
from conftest import ROOT, shell
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


UPDATES = """
import torch
from devices import cpu_kernels

draw = torch.Generator().manual_seed(3)
rows = torch.randperm(50, generator=draw)[:40]
for dim in (1, 7, 8, 16, 17, 33, 64, 128):
    weight, sums, vectors = (torch.randn(*size, generator=draw) for size in (
        (50, dim), (40, dim), (30, 5, dim)))
    row_wise, products = torch.ones(50), torch.empty(30, dim + 10)
    cpu_kernels.row_wise_adagrad((weight, row_wise), rows, sums, 0.1, 1e-8)
    cpu_kernels.adagrad((weight, torch.ones(50, dim)), rows, sums, 0.1, 1e-8)
    cpu_kernels.add_to_rows(weight, rows, sums, 0.3, 1)
    cpu_kernels.dot_products(vectors, False, products)
    print(dim, *(tensor.numpy().tobytes().hex() for tensor in (weight, row_wise, products)))
"""


@pytest.mark.slow
def test_a_process_that_compiles_gets_the_bits_of_one_that_loads_compiled_kernels(tmp_path):
    """Else a run that is the first one on its machine could not be resumed exactly."""
    settings = {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    found = []
    for _ in range(2):
        done = shell(sys.executable, "-c", UPDATES, cwd=tmp_path, env=settings, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert any(
        name.endswith(".nbc") for _, _, names in os.walk(tmp_path / "cache") for name in names
    )
    assert found[0] == found[1]
