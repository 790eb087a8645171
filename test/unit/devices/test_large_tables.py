"""Tables of more than 2^32 numbers: an id times the width fits no 32 bits, and the rows are found.

On a GPU the table is in its memory. On the CPU it is a file with holes, which takes no disk, and
Triton's interpreter runs the kernels.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from interpreted import ON_GPU, kernel_module

DIM = 64
NUM_ROWS = 2**32 // DIM + 40
NUM_BYTES = 4 * NUM_ROWS * DIM
# beside the numbers 2^31 and 2^32, at both ends, some twice
ROWS = [
    *(2**31 // DIM + k for k in (-1, 0, 1, 7)),
    *(2**32 // DIM + k for k in (-1, 0, 1, 39)),
    0, 5, 0, 2**32 // DIM + 39, 2**31 // DIM, 2**31 // DIM,
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    with kernel_module("rows") as module:
        yield module


@pytest.fixture
def weight(tmp_path):
    """(NUM_ROWS, DIM) float32, zeros but in the rows that are used."""
    if ON_GPU:
        if torch.cuda.mem_get_info()[0] < 1.2 * NUM_BYTES:
            pytest.skip(f"the GPU has less than {1.2 * NUM_BYTES / 1e9:.0f} GB free")
        table = torch.zeros(NUM_ROWS, DIM, device="cuda")
    else:
        path = tmp_path / "table"
        path.touch()
        try:
            os.truncate(path, NUM_BYTES)
        except OSError as error:
            pytest.skip(f"no file of {NUM_BYTES / 1e9:.0f} GB here: {error.strerror}")
        flat = torch.from_file(str(path), shared=True, size=NUM_ROWS * DIM, dtype=torch.float32)
        table = flat.view(NUM_ROWS, DIM)
    random = torch.Generator().manual_seed(1)
    rows = torch.tensor(ROWS, device=table.device)
    table[rows] = torch.randn(len(ROWS), DIM, generator=random).to(table.device)
    yield table
    if ON_GPU:
        del table
        torch.cuda.empty_cache()
    else:
        path.unlink()


def test_rows_beyond_32_bits_are_looked_up(kernels, weight):
    rows = torch.tensor(ROWS, device=weight.device)
    got = kernels.look_up(weight, rows, torch.float32)
    assert torch.equal(kernels.look_up(weight, rows.int(), torch.float32), got)
    assert torch.equal(got, F.embedding(rows, weight))
    assert got.abs().sum(1).min() > 1, "each of these rows has numbers"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_columns", [0, 7], ids=["one by one", "equal rows summed"])
def test_rows_beyond_32_bits_are_updated(kernels, weight, num_columns, dtype):
    rows = torch.tensor(ROWS, device=weight.device)
    random = torch.Generator().manual_seed(2)
    gradients = torch.randn(len(ROWS), DIM, generator=random).to(weight.device)
    distinct, places = rows.unique(return_inverse=True)
    want = weight[distinct].index_add(0, places, gradients, alpha=-0.25)
    around = torch.unique(torch.cat([distinct - 2, distinct + 2]) % NUM_ROWS)
    around = around[~torch.isin(around, distinct)]
    before = weight[around].clone()
    kernels.sgd(weight, rows.to(dtype), gradients, 0.25, num_columns)
    torch.testing.assert_close(weight[distinct], want, rtol=1e-6, atol=1e-6)
    assert torch.equal(weight[around], before), "other rows stay"
