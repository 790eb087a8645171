"""A step in chunks is the step of the whole batch, and needs memory for one chunk at a time."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, assert_same_losses, at, trained
from torch.profiler import ProfilerActivity, profile

import dlrm_s_pytorch as dlrm
from criteo.row_layout import FLAT
from dlrm_data_pytorch import RunData
from engine import step
from model.batch import CriteoBatch
from ranks.process import Process
from reporting.reporter import Reporter

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
ROWS = 20  # a batch of 128 is 7 chunks, of 18 and 19 rows


def run(monkeypatch, chunk_rows, *flags):
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", chunk_rows)
    return trained(*CRITEO_MODEL, "--num-batches=10", *flags)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
def test_training_in_chunks_is_training(optimizer, accumulate, kaggle, monkeypatch):
    """Groups of 3 of 10 batches leave one over; without them SGD steps in the backward pass."""
    flags = [f"--data_path={kaggle}", f"--mlperf-grad-accum-iter={accumulate}"]
    flags += [f"--optimizer={optimizer}"]
    # Adagrad's first step of an element is the rate, whatever the size of its gradient, so it
    # shows the rounding of sums that nearly cancel
    tolerance = 1e-6 if optimizer == "sgd" else 5e-5
    flags += [] if optimizer == "sgd" else ["--learning-rate=0.01"]
    whole, wanted = run(monkeypatch, sys.maxsize, *flags)
    chunked, found = run(monkeypatch, ROWS, *flags)
    assert len(found.losses) == 10
    assert_same_losses(found.losses, wanted.losses)
    want = whole.model.state_dict()
    for name, value in chunked.model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=tolerance, msg=at(name))


def test_evaluation_in_chunks_finds_the_same(kaggle, monkeypatch):
    trainer, _ = run(monkeypatch, sys.maxsize, f"--data_path={kaggle}")
    want = dataclasses.asdict(trainer.evaluate())
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", ROWS)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0].dense)))
    assert dataclasses.asdict(trainer.evaluate()) == pytest.approx(want, abs=1e-6)
    assert len(sizes) > len(trainer.data.test) and max(sizes) <= ROWS


# ---------------------------------------------------------------- memory

BOTTOM, TOP, DIM, NUM_TABLES, TABLE_ROWS = (13, 512, 256, 64), (512, 512, 256, 1), 64, 26, 100
CHUNK = 2048


def make_trainer(optimizer, batch_rows):
    """A trainer of the model above, and a batch for it."""
    widths = ["-".join(map(str, widths)) for widths in (BOTTOM, TOP)]
    options = dlrm.parse_options([
        f"--arch-sparse-feature-size={DIM}", f"--arch-mlp-bot={widths[0]}", "--loss-function=bce",
        f"--arch-mlp-top={widths[1]}", f"--optimizer={optimizer}", "--learning-rate=0.01",
    ])  # fmt: skip
    unused = range(1000)
    data = RunData(unused, unused, (TABLE_ROWS,) * NUM_TABLES, BOTTOM[0])
    random = np.random.default_rng(0)
    rows = random.integers(0, TABLE_ROWS, (batch_rows, 40), dtype=np.int32)
    rows[:, 0] %= 2
    block = torch.from_numpy(rows.view(np.uint8))
    trainer = dlrm.Trainer(options, ALONE, data, Reporter())
    return trainer, CriteoBatch(block, batch_rows, (batch_rows,), FLAT)


def peak_of(action, folder):
    """Most bytes of tensors that the action had at a time, beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    marks = [event for event in events if event["name"] == "[memory]"]
    marks = [mark["args"] for mark in sorted(marks, key=lambda mark: mark["ts"])]
    before = marks[0]["Total Allocated"] - marks[0]["Bytes"]
    return max(mark["Total Allocated"] for mark in marks) - before


@pytest.mark.parametrize("batch_rows", [CHUNK, 4 * CHUNK])
@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_a_step_needs_at_most_three_times_the_activations_of_a_chunk(
    optimizer, batch_rows, tmp_path, monkeypatch
):
    """However many rows its batch has.

    Sums of rows are allocated in the first steps and kept, so they are not in what is measured.
    """
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", CHUNK)
    trainer, batch = make_trainer(optimizer, batch_rows)
    for it in (1, 2):
        trainer.train_step(batch, it)
    peak = peak_of(lambda: trainer.train_step(batch, 3), tmp_path)
    interaction = DIM + (NUM_TABLES + 1) * NUM_TABLES // 2
    activations = 4 * CHUNK * (sum(BOTTOM) + NUM_TABLES * DIM + interaction + sum(TOP))
    assert activations / 2 < peak <= 3 * activations
