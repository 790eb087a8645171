"""One training step: forward, backward and, if it is due, the update of all parameters."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.phases import phase
from devices.execution import Execution
from engine.step_graph import StepGraph
from model.batch import Batch
from model.losses import Loss
from optim.dense import DenseOptimizer
from optim.loss_scale import NoScale
from optim.update import Update
from ranks.collectives import sum_over_ranks
from ranks.process import Process

CPU_CHUNK_ROWS = 2048  # more rows at a time leave the cache: the same step takes half as long again


@dataclass(frozen=True)
class Chunking:
    """How the model sees the batches of a data set: whole, in chunks, or padded to one shape.

    Attributes:
        device: where the model is.
        most_rows: rows of a chunk on this rank; a CPU's chunks fit its cache.
        pad_to: rows that short batches are padded to, on each rank; 0: they stay short.
    """

    device: torch.device
    most_rows: int = sys.maxsize
    pad_to: int = 0

    @classmethod
    def of_data(
        cls, num_batches: int, batch_size: int, process: Process, execution: Execution
    ) -> "Chunking":
        """The chunks of a data set's batches.

        Args:
            num_batches: batches of the data set; if there is only one, it is not padded.
            batch_size: rows of a batch, over all ranks.
            process: this rank.
            execution: how its device is used.
        """
        if execution.static_shapes and num_batches > 1:
            return cls(process.device, pad_to=-(-batch_size // process.world_size))
        on_cpu = process.device.type == "cpu"
        return cls(process.device, most_rows=CPU_CHUNK_ROWS if on_cpu else sys.maxsize)

    def chunks(self, batch: Batch) -> list[Batch]:
        """The batch on the device, in chunks, of which all ranks have the same number."""
        with phase("copy"):
            batch = batch.to(self.device)
        if self.pad_to:
            return [batch.padded(self.pad_to)]
        return batch.chunks(self.most_rows)


@dataclass(frozen=True)
class Accumulation:
    """Which batches of an epoch share an optimiser step.

    Attributes:
        every: batches that share a step; those left over at the epoch's end share one too.
        num_batches: batches of the epoch.
    """

    every: int
    num_batches: int

    def is_due(self, it: int) -> bool:
        """Whether the optimiser steps after batch `it`, counted from 1."""
        return it % self.every == 0 or it == self.num_batches

    def num_sharing(self, it: int) -> int:
        """How many batches share the step of batch `it`."""
        first = (it - 1) // self.every * self.every
        return min(self.every, self.num_batches - first)


class _LossWithGradient(torch.autograd.Function):
    """A loss whose gradient is known: its backward pass begins with that.

    `predicted.backward(gradient)` would do the same, but on its first call it imports torch's
    symbolic shapes, and sympy with them: 0.9 s of each start.
    """

    @staticmethod
    def forward(
        ctx: Any, predicted: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradient = gradient
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.gradient, None, None


@dataclass(frozen=True)
class StepParts:
    """What a step is made of.

    Attributes:
        model: the DLRM_Net.
        loss: returns the sum over rows and its gradient.
        optimizer: updates the dense parameters; rows of tables are updated in the backward pass.
        scale: the scale of the loss.
    """

    model: Any
    loss: Loss
    optimizer: DenseOptimizer
    scale: NoScale


class TrainingStep:
    """Trains a model on one batch at a time.

    Args:
        parts: model, loss and optimisers.
        process: this rank.
        execution: how its device is used.
        chunking: how the model sees a batch.
    """

    def __init__(
        self, parts: StepParts, process: Process, execution: Execution, chunking: Chunking
    ) -> None:
        self._model, self._loss = parts.model, parts.loss
        self._optimizer, self._scale = parts.optimizer, parts.scale
        self._process, self._execution, self._chunking = process, execution, chunking
        # a gradient needs no more work if there is one rank, no optimiser state and no scale
        self._can_update_in_backward = (
            process.device.type == "cpu"
            and process.world_size == 1
            and type(parts.optimizer) is DenseOptimizer
            and execution.lower is None
        )
        self._lr = torch.zeros((), device=process.device)  # the recorded step reads its rate here
        self._graph = StepGraph(process.device, self._step_to_record) if execution.graphs else None

    def run(self, batch: Batch, lr: float, num_sharing: int, is_due: bool) -> torch.Tensor:
        """Forward, backward, and the update if it is due.

        Args:
            batch: this rank's rows.
            lr: learning rate of the update.
            num_sharing: batches that share the update: gradients are of their mean loss.
            is_due: this batch is the last of them.

        Returns:
            This rank's share of the mean loss of the batch, on the device.
        """
        if is_due:
            self._optimizer.lr = lr
        num_rows = sum(batch.rows_per_rank)
        chunks = self._chunking.chunks(batch)
        if self._graph is None:
            return self._step(chunks, num_rows, num_sharing, Update(lr, is_due, scale=self._scale))
        self._lr.fill_(lr)
        share = self._graph.run(chunks[0], num_rows)
        self._optimizer.count_step()
        return share

    def close(self) -> None:
        """Give up recorded graphs, before the process group ends."""
        if self._graph is not None:
            self._graph.close()

    def _step_to_record(self, batch: Batch, num_rows: int) -> torch.Tensor:
        """A whole step; everything that changes from one step to the next is on the device."""
        return self._step([batch], num_rows, 1, Update(self._lr, scale=self._scale))

    def _step(
        self, chunks: Sequence[Batch], num_rows: int, num_sharing: int, update: Update
    ) -> torch.Tensor:
        in_backward = self._can_update_in_backward and update.rows_now
        in_backward = in_backward and num_sharing == len(chunks) == 1
        losses = []
        for chunk in chunks:
            # all chunks see the same rows of the tables, so these change with the last one
            is_last = chunk is chunks[-1]
            of_chunk = Update(update.lr, update.rows_now and is_last, in_backward, update.scale)
            losses.append(self._forward_and_back(chunk, num_rows * num_sharing, of_chunk))
        if update.rows_now and not in_backward:
            with phase("update"):
                self._update_dense(update)
        return sum(losses[1:], losses[0]) / num_rows

    def _forward_and_back(self, chunk: Batch, divisor: int, update: Update) -> torch.Tensor:
        """The chunk's loss, summed over its rows; gradients are divided by `divisor`."""
        with phase("copy"):
            features = chunk.decode(self._execution.triton)
        self._scale.begin_forward()
        predicted = self._model(features, chunk.rows_per_rank, update)
        self._scale.check_overflow()
        loss, gradient = self._loss(predicted.detach(), features.label, chunk.mask())
        with phase("backward"):
            gradient = self._scale.scale_gradient(gradient.div_(divisor))
            _LossWithGradient.apply(predicted, loss, gradient).backward()
        self._scale.check_overflow()
        return loss

    def _update_dense(self, update: Update) -> None:
        """Update the MLPs and, if the loss is scaled, the rows whose gradients were kept."""
        gradients = [p.grad for p in self._model.dense_parameters() if p.grad is not None]
        with phase("exchange"):
            sum_over_ranks(self._process, [*gradients, *self._scale.overflow_counts()])
        self._scale.unscale_(gradients)
        self._scale.zero_if_overflown(gradients)
        self._optimizer.update(update.lr)
        self._model.emb_l.apply_kept(update)
        self._scale.end_step()
