"""Kernels for rows of tables equal the operators, also where equal rows are summed first."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, kernel_module
from placements import whole

from devices.execution import Execution
from model.batch import Bags
from model.compression import NoCompression
from model.embedding_tables import EmbeddingTables
from model.static_exchange import StaticExchange
from optim.update import Update
from ranks.process import Process


@pytest.fixture(scope="module")
def kernels():
    with kernel_module("rows") as module:
        yield module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_lookup_equals_embedding(kernels, dim, dtype):
    weight = torch.randn(50, dim, device=DEVICE)
    rows = torch.randint(50, (37,), device=DEVICE)
    got = kernels.look_up(weight, rows, dtype)
    assert got.dtype == dtype and torch.equal(got, weight[rows].to(dtype))
    assert kernels.look_up(weight, rows[:0], dtype).shape == (0, dim)


@pytest.mark.parametrize("on_device", [True, False], ids=["rate on device", "rate a number"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd_sums_equal_rows_and_skips_what_is_not_finite(kernels, dtype, on_device):
    weight = torch.randn(20, 5, device=DEVICE)
    rows = torch.randint(20, (100,), device=DEVICE)
    gradients = torch.randn(100, 5, device=DEVICE).to(dtype)
    gradients[3, 1], gradients[4, 2], gradients[5, 0] = float("nan"), float("inf"), -float("inf")
    finite = torch.nan_to_num(gradients.float(), nan=0.0, posinf=0.0, neginf=0.0)
    want = weight.double().index_add(0, rows, finite.double(), alpha=-0.25)
    kernels.sgd(weight, rows, gradients, torch.tensor(0.25, device=DEVICE) if on_device else 0.25)
    torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-5)


def ids_of_tables(name, num_rows, num_tables):
    """(num_rows * num_tables,) rows of a matrix that has the tables one below the other."""
    random = torch.Generator().manual_seed(3)
    most = {"two rows": 2, "hot": 1000, "all alike": 1, "distinct": 10**6}[name]
    ids = torch.randint(most, (num_rows, num_tables), generator=random)
    if name == "hot":
        ids[torch.rand(num_rows, num_tables, generator=random) < 0.9] = 7
    return (ids % 1000 + 1000 * torch.arange(num_tables)).view(-1).to(DEVICE)


@pytest.mark.parametrize("dim", [5, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["two rows", "hot", "all alike", "distinct"])
def test_sums_of_equal_rows_are_the_same(kernels, name, dtype, dim):
    """Ids of a table lie 3 apart; 75 rows of a batch are two programs and a part of a third."""
    weight = torch.zeros(3000, dim, device=DEVICE)
    rows = ids_of_tables(name, 75, 3).int()
    random = torch.Generator().manual_seed(4)
    gradients = torch.randn(len(rows), dim, generator=random).to(DEVICE, dtype)
    gradients[3, 1], gradients[4, 2], gradients[5, 0] = float("nan"), float("inf"), -float("inf")
    finite = torch.nan_to_num(gradients.float(), nan=0.0, posinf=0.0, neginf=0.0)
    want = weight.double().index_add(0, rows, finite.double(), alpha=-0.25)
    rate = torch.tensor(0.25, device=DEVICE) if dim == 64 else 0.25
    kernels.sgd(weight, rows, gradients, rate, num_columns=3)
    torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-5)


def test_equal_rows_are_added_once_a_program(kernels):
    """What the kernel is for: 32 ids of a row of a table are one addition, not 32.

    In float32 the sum of 2**24 and 32 ones is exact if the ones are summed first; one by one they
    are lost.
    """
    weight = torch.full((2, 16), 2.0**24, device=DEVICE)
    rows = torch.zeros(32, dtype=torch.int32, device=DEVICE)
    gradients = torch.full((32, 16), -1.0, device=DEVICE)
    kernels.sgd(weight, rows, gradients, 1.0, num_columns=1)
    assert (weight[0] == 2**24 + 32).all() and (weight[1] == 2**24).all()


@pytest.mark.parametrize("columns", [1, 4])
def test_any_number_of_ids_may_be_summed(kernels, columns):
    for count in (0, 1, 33):
        weight = torch.zeros(4, 16, device=DEVICE)
        rows = torch.arange(count, device=DEVICE) % 4
        kernels.sgd(weight, rows, torch.ones(count, 16, device=DEVICE), 1.0, columns)
        want = -torch.bincount(rows.cpu(), minlength=4).float()
        assert torch.equal(weight[:, 0].cpu(), want)


def test_rows_that_are_too_long_are_added_one_by_one(kernels):
    weight = torch.zeros(2, 600, device=DEVICE)
    rows = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    kernels.sgd(weight, rows, torch.ones(3, 600, device=DEVICE), 1.0, 1)
    assert (weight[0] == -3).all() and not weight[1].any()


@pytest.mark.parametrize("sums", [True, False])
def test_the_flag_leads_to_the_sums(kernels, sums):
    """Ones that are added to 2**24 one by one are lost."""
    process = Process(0, 1, 0, DEVICE, "gloo")
    placed = NoCompression(16).make_tables((5, 3))
    exchange = StaticExchange(process, placed, whole(placed, 1))
    execution = Execution(triton=True, sums_equal_rows=sums)
    tables = EmbeddingTables(placed, exchange, "sgd", False, execution)
    (matrix,) = tables.matrices
    matrix.weight.fill_(2.0**24)
    ids = torch.tensor([[4, 2]] * 32, dtype=torch.int32, device=DEVICE)
    vectors = tables(Bags(ids.view(-1)), (32,), Update(1.0))
    vectors.backward(-torch.ones_like(vectors))
    want = torch.full((8,), 2.0**24)
    want[[4, 7]] += 32 * sums
    assert torch.equal(matrix.weight[:, 0].cpu(), want)
