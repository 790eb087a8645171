"""One training step: forward, backward and, if it is due, the update of all parameters."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from common.phases import phase
from devices.execution import Execution
from engine.step_graph import StepGraph
from model.batch import Batch
from model.layer_operators import Target
from model.losses import CrossEntropy, Loss, make_loss
from optim.dense import DenseOptimizer, make_dense_optimizer
from optim.flat_parameters import FlatOptimizer
from optim.loss_scale import NoScale, make_loss_scale
from optim.update import Update
from ranks.collectives import PendingSum, sum_in_rank_order
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

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, model: Any, device: torch.device, execution: Execution
    ) -> "StepParts":
        """What the flags want a training step of the DLRM_Net to be made of."""
        return cls(
            model,
            make_loss(options.loss_function, options.loss_weights, device, execution.triton),
            _make_optimizer(options, model, execution),
            make_loss_scale(execution.lower, device),
        )


def _make_optimizer(
    options: argparse.Namespace, model: Any, execution: Execution
) -> DenseOptimizer:
    """The optimiser of the DLRM_Net's dense parameters."""
    name, rate, fused = options.optimizer, options.learning_rate, execution.fused_optimizer
    if model.flat_parameters is None:
        return make_dense_optimizer(name, model.dense_parameters(), rate, fused)
    return FlatOptimizer(model.flat_parameters, rate, name != "sgd", fused and execution.triton)


class _Forward(NamedTuple):
    """What the backward pass of a chunk of b rows begins with.

    Attributes:
        result: the predictions (b, 1) or, if the model has computed the loss, the loss; with the
            graph of the forward pass.
        loss: the sum over the rows.
        gradient: (b, 1) that of the loss; None: the model has it.
    """

    result: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor | None


class TrainingStep:
    """Trains a model on one batch at a time.

    Args:
        parts: model, loss and optimisers.
        process: this rank.
        execution: how its device is used.
        chunking: how the model sees a batch.
        skips: a batch whose mean loss is not finite changes nothing. Each step waits for its loss,
            and its chunks' forward passes all come before the first backward pass.
    """

    def __init__(
        self,
        parts: StepParts,
        process: Process,
        execution: Execution,
        chunking: Chunking,
        skips: bool = False,
    ) -> None:
        self._model, self._loss = parts.model, parts.loss
        self._optimizer, self._scale = parts.optimizer, parts.scale
        self._process, self._execution, self._chunking = process, execution, chunking
        self._skips, self._num_kept = skips, 0  # batches whose gradients wait for the update
        # a batch that may be skipped must not add gradients in its forward pass, as a head does
        self._label_weights: torch.Tensor | None = None  # of a loss that the model computes
        if isinstance(parts.loss, CrossEntropy) and parts.model.top_l.computes_loss and not skips:
            self._label_weights = parts.loss.label_weights
        self._sum: PendingSum | None = None  # of the gradients that every rank has its share of
        # a gradient needs no more work if there is one rank, no optimiser state and no scale
        self._can_update_in_backward = (
            process.device.type == "cpu"
            and process.world_size == 1
            and type(parts.optimizer) is DenseOptimizer
            and execution.lower is None
        )
        self._lr = torch.zeros((), device=process.device)  # the recorded step reads its rate here
        self._graph = StepGraph(process.device, self._step_to_record) if execution.graphs else None

    def run(
        self, batch: Batch, lr: float, num_sharing: int, is_due: bool
    ) -> tuple[torch.Tensor, bool]:
        """Forward, backward, and the update if it is due.

        Args:
            batch: this rank's rows.
            lr: learning rate of the update.
            num_sharing: batches that share the update: gradients are of their mean loss.
            is_due: this batch is the last of them.

        Returns:
            This rank's share of the mean loss of the batch, on the device, and whether there was an
            update: there is none if it is not due, or if all batches that share it were skipped.
        """
        num_rows = sum(batch.rows_per_rank)
        chunks = self._chunking.chunks(batch)
        if self._graph is None:
            update = Update(lr, is_due, scale=self._scale)
            share, has_updated = self._step(chunks, num_rows, num_sharing, update)
        else:
            self._lr.fill_(lr)
            share, has_updated = self._graph.run(chunks[0], num_rows), True
            self._optimizer.count_step()
        if has_updated:
            self._optimizer.lr = lr
        return share, has_updated

    @property
    def replays(self) -> list[Callable[[], None]]:
        """For each recorded step, what replays it on the batch that it has had last, to time it."""
        return [] if self._graph is None else self._graph.replays

    def close(self) -> None:
        """Give up recorded graphs, before the process group ends."""
        if self._graph is not None:
            self._graph.close()

    def _step_to_record(self, batch: Batch, num_rows: int) -> torch.Tensor:
        """A whole step; everything that changes from one step to the next is on the device."""
        return self._step([batch], num_rows, 1, Update(self._lr, scale=self._scale))[0]

    def _step(
        self, chunks: Sequence[Batch], num_rows: int, num_sharing: int, update: Update
    ) -> tuple[torch.Tensor, bool]:
        in_backward = self._can_update_in_backward and update.rows_now
        in_backward = in_backward and num_sharing == len(chunks) == 1
        # all chunks see the same rows of the tables, so these change with the last one
        last = replace(update, dense_now=in_backward, mean_over=num_rows * num_sharing)
        if update.rows_now and not update.scale.is_on:  # a scale counts overflows to the end
            last = replace(last, dense_is_ready=self._begin_sum)
        updates = [*[replace(last, rows_now=False, dense_is_ready=None)] * (len(chunks) - 1), last]
        forwards: Iterable[_Forward] = map(self._forward, chunks, updates)
        if self._skips:
            self._scale.begin_batch()
            forwards = list(forwards)
            share = _sum([forward.loss for forward in forwards]) / num_rows
            if not math.isfinite(sum_in_rank_order(self._process, share)):
                self._scale.drop_batch()
                return share, self._update_if_due(update, in_backward)
        loss = self._back(forwards, num_rows * num_sharing)
        self._num_kept += 1
        has_updated = self._update_if_due(update, in_backward)
        flat = self._model.flat_parameters
        if flat is None:
            return loss / num_rows, has_updated
        # a parameter that becomes nan shows in the loss of its step
        return torch.add(flat.broken, loss, alpha=1 / num_rows), has_updated

    def _forward(self, chunk: Batch, update: Update) -> _Forward:
        with phase("copy"):
            features = chunk.decode(self._model.decoding)
        self._scale.begin_forward()
        if self._label_weights is not None:
            target = Target(
                features.label,
                self._label_weights,
                mask=chunk.mask(),
                divisor=update.mean_over,
                scale=self._scale.factor(),
                clamp=self._model.architecture.clamp,
            )
            result = self._model(features, chunk.rows_per_rank, update, target)
            return _Forward(result, result.detach(), None)
        predicted = self._model(features, chunk.rows_per_rank, update)
        self._scale.check_overflow()
        return _Forward(predicted, *self._loss(predicted.detach(), features.label, chunk.mask()))

    def _back(self, forwards: Iterable[_Forward], divisor: int) -> torch.Tensor:
        """The backward passes, of gradients divided by `divisor`; returns the sum of all losses."""
        losses = []
        for result, loss, gradient in forwards:
            with phase("backward"):
                if gradient is not None:
                    gradient = self._scale.scale_gradient(gradient.div_(divisor))
                    result = _LossWithGradient.apply(result, loss, gradient)
                result.backward()
            self._scale.check_overflow()
            losses.append(loss)
        return _sum(losses)

    def _update_if_due(self, update: Update, in_backward: bool) -> bool:
        """Update what the backward passes have not, if it is due and any batch had one."""
        if not (update.rows_now and self._num_kept):
            return False
        self._num_kept = 0
        if not in_backward:
            with phase("update"):
                self._update_dense(update)
        return True

    def _begin_sum(self) -> None:
        """Begin to sum what ranks have their shares of, while rows of tables are updated."""
        shared = [*self._model.emb_l.shared_gradients(), *self._scale.overflow_counts()]
        with phase("exchange"):
            self._sum = PendingSum(self._process, [*self._optimizer.gradients(), *shared])

    def _update_dense(self, update: Update) -> None:
        """Update the MLPs, and the rows whose gradients are still kept."""
        if self._sum is None:
            self._begin_sum()
        assert self._sum is not None
        with phase("exchange"):
            self._sum.wait()
        self._sum = None
        gradients = self._optimizer.gradients()
        self._scale.unscale_(gradients)
        self._scale.zero_if_overflown(gradients)
        self._optimizer.update(update.lr)
        self._model.emb_l.apply_kept(update)
        self._scale.end_step()


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(tensors[1:], tensors[0])
