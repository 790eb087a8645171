"""A batch is cut into chunks and back without a copy, as many on each rank."""

import numpy as np
import pytest
import torch

from common.bag_kernels import start_stream
from common.draw_state import DrawState
from criteo.row_layout import FLAT
from model.batch import BagBatch, CriteoBatch


@pytest.mark.parametrize(
    "shares, max_rows, num_chunks",
    [((128,), 20, 7), ((128,), 128, 1), ((2,), 1, 2), ((64, 64), 20, 4), ((21, 20, 20), 20, 2),
     ((2, 1, 0), 1, 2)],
)  # fmt: skip
def test_chunks_are_the_batch_in_order_and_as_many_on_each_rank(shares, max_rows, num_chunks):
    """A rank of fewer rows has chunks of none, as all ranks take part in a chunk's exchange."""
    for rank, num_rows in enumerate(shares):
        block = torch.arange(num_rows * 40, dtype=torch.int32).view(num_rows, 40)
        block = block.view(torch.uint8)
        chunks = CriteoBatch(block, num_rows, shares, FLAT).chunks(max_rows)
        assert len(chunks) == num_chunks and max(chunk.num_rows for chunk in chunks) <= max_rows
        assert torch.equal(torch.cat([chunk.block for chunk in chunks]), block)
        for chunk in chunks:
            assert chunk.num_rows == len(chunk.block) == chunk.rows_per_rank[rank]
            assert chunk.block.untyped_storage().data_ptr() == block.data_ptr(), "it is a copy"
        by_rank = zip(*(chunk.rows_per_rank for chunk in chunks), strict=True)
        assert tuple(sum(rows) for rows in by_rank) == shares


def test_a_batch_brings_its_state_to_the_device():
    state = DrawState.of_stream(start_stream(1), 4)
    block = torch.zeros(3 * 4, dtype=torch.int32)
    batch = BagBatch(block, 3, (3,), 1, 1, np.ones((1, 1), np.int64), state_after=state)
    moved = batch.to(torch.device("meta"))
    assert moved.block.device.type == "meta" and moved.state_after is state
    (chunk,) = batch.padded(4).chunks(1)
    assert chunk.state_after is state
