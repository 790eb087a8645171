"""TensorBoard gets what lines and evaluations have, by step; nan, and what is not there, is not."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reporting.log_lines import StepPosition
from reporting.metrics import Metrics
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.tensor_board import TensorBoard


def test_scalars_by_step(tmp_path):
    with TensorBoard(str(tmp_path), torch.device("cpu"), print) as board:
        board.training(TrainingRecord(StepPosition(4, 10, 1), 0.5, 0.1, 2.0, 1000.0))
        board.training(TrainingRecord(StepPosition(5, 10, 1), float("nan"), 0.2, 2.0, 2000.0))
        metrics = Metrics(0.75, log_loss=0.25)
        board.evaluation(EvaluationRecord(StepPosition(5, 10, 1), metrics, 0.75, 0.0, 100, 2.0))
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    scalars = {
        tag: {event.step: round(event.value, 6) for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }
    memory = scalars.pop("Train/HostMemory")
    assert set(memory) == {14, 15} and memory[14] > 1e6
    assert scalars == {
        "Train/Loss": {14: 0.5},
        "Train/LearningRate": {14: 0.1, 15: 0.2},
        "Train/RowsPerSecond": {14: 1000, 15: 2000},
        "Test/Acc": {15: 0.75},
        "Test/LogLoss": {15: 0.25},
        "Test/RowsPerSecond": {15: 50},
    }
