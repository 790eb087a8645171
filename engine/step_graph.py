"""Training steps that a GPU replays with one call of the host (--cuda-graphs)."""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.errors import UserError
from common.phases import phase
from devices.card import on_side_stream, synchronize
from devices.gpu import capture
from model.batch import Batch
from ranks.process import Process

WARM_UP_STEPS = 3  # before the recording, in which libraries cannot allocate their work space


_Shape = tuple[tuple[int, ...], int]  # rows of each rank, and rows of all ranks without padding


@dataclass(frozen=True)
class _Recorded:
    """A recorded step: the block that it reads, its graph, and the loss that it writes."""

    block: torch.Tensor
    graph: Any
    loss: torch.Tensor


class StepGraph:
    """Records the fourth step on batches of a shape and replays it from then on.

    A replay runs the same kernels on the same memory and none of the step's Python, so everything
    that changes from step to step has to be on the device. Padded batches, and the first ones of a
    shape, are not replayed.

    Args:
        device: a GPU.
        step: trains on a batch that is on the device, given its number of rows over all ranks, and
            returns the loss.
    """

    def __init__(self, device: torch.device, step: Callable[[Batch, int], torch.Tensor]) -> None:
        self._device, self._step = device, step
        self._recorded: dict[_Shape, _Recorded] = {}
        self._seen: Counter[_Shape] = Counter()

    def run(self, batch: Batch, num_rows: int) -> torch.Tensor:
        """Train on a batch of num_rows rows; the next call overwrites the loss that is returned."""
        shape = batch.rows_per_rank, num_rows
        self._seen[shape] += not batch.num_padding
        if batch.num_padding or self._seen[shape] <= WARM_UP_STEPS:
            with on_side_stream(self._device):
                return self._step(batch, num_rows)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(batch, num_rows)
        with phase("graph"):
            return self._replay(self._recorded[shape], batch)

    @property
    def replays(self) -> list[Callable[[], None]]:
        """For each recorded step, what replays it on the batch that it has had last."""
        return [recorded.graph.replay for recorded in self._recorded.values()]

    def close(self) -> None:
        """Wait for the device and give up the recorded steps.

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
        graph, loss = capture(lambda: self._step(with_own_block, num_rows))
        return _Recorded(block, graph, loss)


def check_graphs(options: argparse.Namespace, process: Process) -> None:
    """Raise a UserError if --cuda-graphs is given and a step cannot be recorded.

    A recorded step has one shape, and everything in it runs on the GPU.
    """
    if not options.cuda_graphs:
        return
    problems = {
        f"needs --use-gpu: the device is {process.device.type}": process.device.type != "cuda",
        "needs Criteo data (--data_path): other data's batches differ in shape": (
            options.data_generation != "dataset"
        ),
        f"needs a --mini-batch-size that {process.world_size} ranks share evenly: got"
        f" {options.mini_batch_size}": options.mini_batch_size % process.world_size > 0,
        "does not go with --mlperf-grad-accum-iter above 1": options.mlperf_grad_accum_iter > 1,
        "does not go with --on-nan=skip: a recorded step cannot look at its loss": (
            options.on_nan == "skip"
        ),
        f"needs --dist-backend=nccl: {process.backend} goes through the host": (
            process.world_size > 1 and process.backend != "nccl"
        ),
    }
    for message, is_problem in problems.items():
        if is_problem:
            raise UserError(f"--cuda-graphs {message}")
