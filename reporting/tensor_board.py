"""TensorBoard's files."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reporting.memory_use import memory_use
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.reporter import Reporter


class TensorBoard(Reporter):
    """Writes scalars into a folder.

    Args:
        folder: where they go; empty: none are written.
        device: the device whose memory is told.
        say: prints a warning if nothing can be written.
    """

    def __init__(self, folder: str, device: torch.device, say: Callable[[str], object]) -> None:
        self._folder, self._device, self._say = folder, device, say
        self._writer: Any = None

    def training(self, record: TrainingRecord) -> None:
        """Write the loss, what the step was made with, and what it takes."""
        memory = memory_use(self._device)
        scalars = {
            "Train/Loss": record.loss,
            "Train/LearningRate": record.lr,
            "Train/RowsPerSecond": record.rows_per_second,
            "Train/HostMemory": memory.host,
            "Train/DeviceMemory": memory.device,
        }
        self._write(scalars, record.where.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the metrics."""
        metrics = record.metrics
        scalars = {
            "Test/Acc": metrics.accuracy,
            "Test/AUC": metrics.auc,
            "Test/LogLoss": metrics.log_loss,
            "Test/RowsPerSecond": record.rows_per_second,
        }
        self._write(scalars, record.where.step)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, scalars: Mapping[str, float | None], step: int) -> None:
        if self._folder and self._writer is None:
            self._open()
        for name, value in scalars.items():
            if self._writer is not None and value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def _open(self) -> None:
        try:
            # the import takes a second, so it waits for the first line
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder)
        except Exception as error:  # a tensorboard that does not go with its protobuf or numpy
            reason = " ".join(str(error).split())
            self._say(f"warning: no TensorBoard log in {self._folder} ({reason})")
            self._folder = ""
