"""A run between two steps: everything that the next steps, lines and files depend on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoints.generators import generators_as_json, restore_generators
from checkpoints.index import Index, damaged_index
from checkpoints.json_values import (
    as_json,
    bool_of,
    list_of,
    number_of,
    numbers_of,
    object_of,
    readable,
    value_of,
    whole_of,
)
from checkpoints.matrices import MatrixShape, held_rows, matrix_shapes
from checkpoints.shard_file import DamagedError, read_tensors
from common.draw_state import DrawState
from common.errors import UserError
from engine.loss_meter import LossMeter
from engine.model_file import ModelState
from engine.progress import Progress
from engine.value_checks import LARGEST

# of Progress; old checkpoints lack them
LATER = {"since_best_accuracy": 0, "since_best_auc": 0, "is_seeded": False}


class Seekable(Protocol):
    """Training batches that can be had from any batch on."""

    def seek(self, state: DrawState | None) -> None:
        """Go to where random data is drawn from; None: from batch 0, or by numbers alone."""


@dataclass
class Place:
    """What a resumed run begins with.

    Attributes:
        next_draw: where random data is drawn from after the last optimiser step; None: from batch
            0, or by numbers alone.
        owes_evaluation: an evaluation was left because a signal came; it is done again.
    """

    next_draw: DrawState | None = None
    owes_evaluation: bool = False


@dataclass(frozen=True)
class RunState:
    """What a checkpoint saves and a resumed run restores.

    Attributes:
        model: parameters, optimisers and the scale of the loss.
        progress: how far training is.
        losses: those since the last log line.
        data: the training batches.
        place: what a resumed run begins with.
    """

    model: ModelState
    progress: Progress
    losses: LossMeter
    data: Seekable
    place: Place

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint's tensors, on all ranks."""
        return sum(shape.num_bytes for shape in matrix_shapes(self.model).values())

    @property
    def step(self) -> int:
        """Training steps done, over all epochs."""
        return self.progress.epoch * self.model.num_batches + self.progress.iter

    def as_json(self) -> dict[str, Any]:
        """All of it that is no matrix; waits for the device. All ranks call it.

        Raises:
            UserError: the loss of a step was not finite, with --on-nan=stop.
        """
        model, progress = self.model, self.progress
        values = {
            "progress": vars(progress),
            "next_draw": draw.to_json() if (draw := self.place.next_draw) else None,
            "owes_evaluation": self.place.owes_evaluation,
            "num_batches": model.num_batches,
            "num_test_batches": model.num_test_batches,
            "num_epochs": model.num_epochs,
            "losses": self.losses.state(),
            "loss_scale": model.scale.exact_state(),
            "generators": generators_as_json(),
            "optimizer": model.optimizer_name,
            "dense_lr": float(model.dense_optimizer.lr),
            "dense_scalars": [_scalars(state) for state in model.dense_optimizer.state],
            "joins": list(model.tables.joins),
            "serving": model.serving.to_json() if model.serving else None,
            "world_size": model.process.world_size,
            "torch": torch.__version__,
        }
        return {name: as_json(value) for name, value in values.items()}

    def restore(self, folder: Path, index: Index) -> None:
        """Continue from a checkpoint whose matrices are this model's.

        Raises:
            DamagedError: a file is not what was written. Parts of the state are changed then.
        """
        try:
            self._restore_values(dict(index.state))
        except (ValueError, OverflowError) as error:
            raise damaged_index(folder, error) from error
        self._read_matrices(folder, index)

    def _restore_values(self, values: dict[str, Any]) -> None:
        model, optimizer = self.model, self.model.dense_optimizer
        progress = progress_of(object_of(values, "progress"))
        if progress.iter > model.num_batches:
            raise ValueError(f"progress.iter is {progress.iter} of {model.num_batches}")
        vars(self.progress).update(vars(progress))
        self._restore_place(values)
        self.losses.restore(object_of(values, "losses"))
        scale, expected = numbers_of(values, "loss_scale"), len(model.scale.exact_state())
        if len(scale) != expected or any(not 0 <= number < LARGEST for number in scale):
            raise ValueError(f"loss_scale is {scale}, expected {expected} numbers")
        model.scale.restore_exact(scale)
        restore_generators(object_of(values, "generators"))
        optimizer.lr = number_of(values, "dense_lr")
        scalars = list_of(values, "dense_scalars")
        if len(scalars) != len(optimizer.state):
            raise ValueError(f"dense_scalars are {len(scalars)}, expected {len(optimizer.state)}")
        for own, saved in zip(optimizer.state, scalars, strict=True):
            for name in _scalars(own):
                _fill(own[name], saved, name)

    def _restore_place(self, values: dict[str, Any]) -> None:
        """Let random data continue at the batch after the last optimiser step."""
        self.place.owes_evaluation = bool_of(values, "owes_evaluation")
        draw = value_of(values, "next_draw")
        self.place.next_draw = None if draw is None else DrawState.from_json(draw)
        self.data.seek(self.place.next_draw)

    def _read_matrices(self, folder: Path, index: Index) -> None:
        """Copy this rank's rows out of the files that have some, one file after the other."""
        held = held_rows(self.model)
        for file in index.files:
            pairs = [(shard, rows) for shard in file.shards for rows in held if rows.overlap(shard)]
            if not pairs:
                continue
            tensors = read_tensors(folder / file.name, file.facts)
            for shard, rows in pairs:
                try:
                    rows.copy_from(shard, tensors)
                except ValueError as error:
                    raise DamagedError(f"{folder / file.name}: {error}") from error


def progress_of(values: dict[str, Any]) -> Progress:
    """The progress that JSON describes.

    Raises:
        ValueError: it describes none.
    """
    readers: dict[type, Any] = {bool: bool_of, int: whole_of, float: number_of}
    values = LATER | values
    kinds = {name: type(value) for name, value in vars(Progress()).items()}
    progress = Progress(**{name: readers[kind](values, name) for name, kind in kinds.items()})
    if progress.resume_iter > progress.iter:
        raise ValueError(f"progress.resume_iter is {progress.resume_iter} of {progress.iter}")
    return progress


def _fill(scalar: torch.Tensor, values: Any, key: str) -> None:
    number = number_of(values, key)
    if math.isfinite(number) and abs(number) > torch.finfo(scalar.dtype).max:
        raise ValueError(f"{key} is {number}, which is no {scalar.dtype}")
    scalar.fill_(number)


def _scalars(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in state.items() if value.dim() == 0}


def check_same_model(where: str, index: Index, state: RunState) -> None:
    """Raise a UserError if the checkpoint's matrices are not this model's.

    Args:
        where: what the message begins with.
        index: the checkpoint's.
        state: the run's.
    """
    own = matrix_shapes(state.model)
    for key in sorted({*own, *index.matrices}):
        there, here = _text(index.matrices.get(key)), _text(own.get(key))
        if there != here:
            raise UserError(
                f"{where} is of another model: {readable(key)} is {there} there, {here} in this"
                " model: give the flags and the data it had"
            )


def _text(shape: MatrixShape | None) -> str:
    if shape is None:
        return "absent"
    tensors = sorted(shape.row_shapes.items())
    return ", ".join(f"{readable(name)} {(shape.num_rows, *row)}" for name, row in tensors)
