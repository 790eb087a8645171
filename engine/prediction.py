"""Click probabilities of a batch that comes in chunks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from devices.execution import Execution
from model.batch import Batch

Prediction = tuple[torch.Tensor, torch.Tensor]


def predictions(model: Any, chunks: Sequence[Batch], execution: Execution) -> Iterator[Prediction]:
    """Probabilities and labels, (b, 1) each, of the b rows of each chunk, padding left out.

    Args:
        model: the DLRM_Net.
        chunks: those of this rank's rows of a batch; all ranks have the same number.
        execution: how the device is used.
    """
    for chunk in chunks:
        features = chunk.decode(execution.triton)
        predicted = model(features, chunk.rows_per_rank)
        count = chunk.num_rows - chunk.num_padding
        yield predicted[:count], features.label[:count]


def predictions_together(
    model: Any, chunks: Sequence[Batch], execution: Execution
) -> Iterator[Prediction]:
    """The same on the CPU at one time, for MLPs that have to see all rows of a batch.

    Tables and interaction still take chunks, because more rows leave the cache.
    """
    features = [chunk.decode(execution.triton) for chunk in chunks]
    dense = model.bot_l(torch.cat([part.dense for part in features]))
    parts = zip(dense.split([chunk.num_rows for chunk in chunks]), features, chunks, strict=True)
    vectors = [
        model.interact(rows, model.emb_l(part.bags, chunk.rows_per_rank))
        for rows, part, chunk in parts
    ]
    probability = model.clamped(model.top_l(torch.cat(vectors)))
    yield probability, torch.cat([part.label for part in features])
