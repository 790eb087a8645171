"""Training steps that a GPU replays with one call of the host (--cuda-graphs)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from devices.card import apart, synchronize
from devices.gpu import capture
from model.batch import Batch

WARM_UP_STEPS = 3  # before a step is recorded: libraries make ready what they cannot make then


_Shape = tuple[tuple[int, ...], int]  # rows of each rank, and how many of them all count


@dataclass(frozen=True)
class _Recorded:
    """A step that was recorded: where it reads its batch, its graph, where its loss lies."""

    block: torch.Tensor
    graph: Any
    loss: torch.Tensor


class StepGraph:
    """A step on batches of one shape, recorded at the fourth and replayed from then on.

    A replay runs the same kernels on the same memory; nothing of the step's Python runs again, so
    all that changes from step to step has to be on the device. Batches of other shapes, and those
    that are filled up, are stepped through as usual.

    Args:
        device: a GPU.
        step: trains on a batch that is on the device, of so many rows over all ranks, and gives its
            loss.
    """

    def __init__(self, device: torch.device, step: Callable[[Batch, int], torch.Tensor]) -> None:
        self._device, self._step = device, step
        self._recorded: dict[_Shape, _Recorded] = {}
        self._seen: Counter[_Shape] = Counter()

    def run(self, batch: Batch, num_rows: int) -> torch.Tensor:
        """Train on a batch of num_rows rows; the next call overwrites the loss that it gives."""
        shape = batch.rows_per_rank, num_rows
        self._seen[shape] += not batch.num_padding
        if batch.num_padding or self._seen[shape] <= WARM_UP_STEPS:
            with apart(self._device):
                return self._step(batch, num_rows)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(batch, num_rows)
        return self._replay(self._recorded[shape], batch)

    def close(self) -> None:
        """Wait for the device and give up what is recorded.

        A process group with NCCL does not end while a graph holds its collectives
        (ncclCommDestroy waits for them; pytorch issue 115388). Not to be called after an error:
        the device may be waiting for a rank that has gone.
        """
        if self._recorded:
            synchronize(self._device)
        for recorded in self._recorded.values():
            recorded.graph.reset()
        self._recorded.clear()

    def _replay(self, recorded: _Recorded, batch: Batch) -> torch.Tensor:
        recorded.block.copy_(batch.block)
        recorded.graph.replay()
        return recorded.loss

    def _record(self, batch: Batch, num_rows: int) -> _Recorded:
        block = batch.block.clone()
        with_own_block = replace(batch, block=block)
        graph, loss = capture(self._device, lambda: self._step(with_own_block, num_rows))
        return _Recorded(block, graph, loss)
