"""Batches whose loss is nan, as damaged data would have it."""

import dataclasses

import torch

from criteo.row_layout import FLAT
from model.batch import BagBatch, CriteoBatch

NAN_BITS = 0x7FC00000


def spoilt(batch):
    """The batch with a number in its last row that is nan, or whose logarithm is.

    Rows of Criteo data come on the host.
    """
    if isinstance(batch, BagBatch):
        block = batch.block.clone()
        block[(batch.num_rows - 1) * batch.num_dense] = NAN_BITS
        return dataclasses.replace(batch, block=block)
    rows = batch.layout.unpack(batch.block.cpu().numpy())
    rows[-1, 1] = -5
    packed = torch.from_numpy(FLAT.pack(rows.T))
    return CriteoBatch(packed, batch.num_rows, batch.rows_per_rank, FLAT)
