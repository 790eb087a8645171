"""--on-nan=skip: a batch whose loss is not finite is a batch that was not there."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, losses_of
from ranks_program import SPOILT, run_cases
from spoilt import spoilt

import dlrm_s_pytorch as dlrm
from criteo.row_layout import FLAT
from dlrm_data_pytorch import RunData
from engine import step
from model.batch import CriteoBatch
from optim.loss_scale import LossScale
from ranks.process import Process
from reporting.reporter import Reporter

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
ROWS, NUM_TABLES, TABLE_ROWS, NUM_BATCHES = 60, 26, 30, 6
MODEL = (
    "--arch-sparse-feature-size=8 --arch-mlp-bot=13-16-8 --arch-mlp-top=16-1 --loss-function=bce"
    " --learning-rate=0.1 --lr-num-warmup-steps=9"
).split()


def make_trainer(*flags):
    np.random.seed(0)
    data = RunData(range(NUM_BATCHES), range(1), (TABLE_ROWS,) * NUM_TABLES, 13)
    return dlrm.Trainer(dlrm.parse_options([*MODEL, *flags]), ALONE, data, Reporter())


def make_batches(num_batches):
    random, batches = np.random.default_rng(1), []
    for _ in range(num_batches):
        rows = random.integers(0, TABLE_ROWS, (ROWS, 40), dtype=np.int32)
        rows[:, 0] %= 2
        batches.append(CriteoBatch(torch.from_numpy(FLAT.pack(rows.T)), ROWS, (ROWS,), FLAT))
    return batches


def everything(trainer):
    """All numbers that a step may change, by name."""
    found = dict(trainer.model.named_parameters())
    for k, store in enumerate(trainer.model.emb_l._stores()):
        found |= {f"rows.{k}.{name}": value for name, value in store.row_tensors().items()}
    dense = trainer.state.dense_optimizer
    for k, state in enumerate(dense.state):
        found |= {f"dense.{k}.{name}": value for name, value in state.items()}
    counts = [dense.lr, float(trainer.progress.num_steps), *trainer.state.scale.exact_state()]
    found["counts"] = torch.tensor(counts, dtype=torch.float64)
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(trainer, other, **tolerance):
    want = everything(other)
    for name, value in everything(trainer).items():
        if tolerance:
            torch.testing.assert_close(value, want[name], **tolerance, msg=lambda m, n=name: n + m)
        else:
            assert torch.equal(value, want[name]), name


CASES = {
    "sgd": "",
    "adagrad": "--optimizer=adagrad",
    "rwsadagrad": "--optimizer=rwsadagrad",
    "learned": "--weighted-pooling=learned --optimizer=rwsadagrad",
    "qr": "--qr-flag --qr-threshold=10",
    "md": "--md-flag --md-threshold=10 --optimizer=adagrad",
    "fp16": "--amp=fp16",
}


@pytest.mark.parametrize("chunk_rows", [sys.maxsize, 25])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_is_skipped_changes_nothing(case, chunk_rows, monkeypatch):
    """Only the last chunk of the second batch has a row that spoils its loss."""
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", chunk_rows)
    skipping, without = (
        make_trainer("--on-nan=skip", *CASES[case].split()),
        make_trainer(*CASES[case].split()),
    )
    first, bad, last = make_batches(3)
    assert math.isfinite(skipping.train_step(first, 1))
    assert not math.isfinite(skipping.train_step(spoilt(bad), 2))
    assert math.isfinite(skipping.train_step(last, 3))
    without.train_step(first, 1)
    without.train_step(last, 2)
    assert_same(skipping, without)
    assert skipping.progress.num_steps == 2 and skipping.progress.resume_iter == 3


@pytest.mark.parametrize("chunk_rows", [sys.maxsize, 25])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
def test_without_such_a_batch_skip_is_stop(optimizer, chunk_rows, monkeypatch):
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", chunk_rows)
    flags = [f"--optimizer={optimizer}", "--mlperf-grad-accum-iter=2"]
    skipping, stopping = make_trainer("--on-nan=skip", *flags), make_trainer(*flags)
    for it, batch in enumerate(make_batches(3), 1):
        assert torch.equal(skipping.train_step(batch, it), stopping.train_step(batch, it))
    assert_same(skipping, stopping)


@pytest.mark.parametrize("chunk_rows", [sys.maxsize, 25])
@pytest.mark.parametrize("bad", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("case", CASES)
def test_a_skipped_batch_adds_nothing_to_the_step_that_it_shares(
    case, bad, chunk_rows, monkeypatch
):
    """Three share a step: the other ones' gradients are still divided by three."""
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", chunk_rows)
    flags = CASES[case].split()
    skipping = make_trainer("--on-nan=skip", "--mlperf-grad-accum-iter=3", *flags)
    without, batches = make_trainer(*flags), make_batches(3)
    good = [k for k in range(3) if k not in bad]
    for k, batch in enumerate(batches):
        skipping.train_step(spoilt(batch) if k in bad else batch, k + 1)
    lr = without.schedule.rate(1)
    for k in good:
        _, has_updated = without.step.run(batches[k], lr, 3, k == good[-1])
    assert has_updated
    without.progress.note_due(3, has_updated)
    assert_same(skipping, without, rtol=0, atol=1e-7)
    assert skipping.progress == without.progress


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_step_all_of_whose_batches_are_skipped_is_none(optimizer):
    """A resumed run does not repeat them all the same."""
    trainer = make_trainer(
        "--on-nan=skip", "--mlperf-grad-accum-iter=2", f"--optimizer={optimizer}"
    )
    untouched, batches = make_trainer(f"--optimizer={optimizer}"), make_batches(4)
    for it in (1, 2):
        trainer.train_step(spoilt(batches[it - 1]), it)
    assert_same(trainer, untouched)
    assert (trainer.progress.num_steps, trainer.progress.resume_iter) == (0, 2)
    for it in (3, 4):
        trainer.train_step(batches[it - 1], it)
    assert (trainer.progress.num_steps, trainer.progress.resume_iter) == (1, 4)


def test_a_run_tells_of_skipped_batches_with_its_next_line():
    """The mean loss is that of the other batches, and nan if there are none."""
    flags = [*SMALL_MODEL, "--tensor-board-filename=", "--on-nan=skip"]
    found = run_cases({"each": flags, "some": [*flags, "--print-freq=4"]})
    assert SPOILT == (4, 7, 8)
    each = losses_of(found["each"]["out"])
    assert [line[0] for line in each if math.isnan(line[3])] == list(SPOILT)
    warning = "warning: the loss of {} batch(es) was not finite, the first at it {} of epoch 0:"
    assert [line for line in found["some"]["out"].splitlines() if "warning" in line] == [
        warning.format(1, 4) + " skipped (--on-nan=skip)",
        warning.format(2, 7) + " skipped (--on-nan=skip)",
    ]
    losses = {line[0]: line[3] for line in each}
    for (it, *_, loss), good in zip(
        losses_of(found["some"]["out"]), [(1, 2, 3), (5, 6), (9, 10)], strict=True
    ):
        assert it == min(4 * -(-good[-1] // 4), 10)
        assert loss == pytest.approx(sum(losses[k] for k in good) / len(good), abs=2e-6)


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_in_a_skipped_batch_spoils_no_other_batch(overflows, monkeypatch):
    """The chip's flag is set while it is computed. An overflow in the one before stays one."""

    class Flagged(LossScale):
        is_set = False

        def check_overflow(self):
            self.overflows.add_(float(Flagged.is_set))

    monkeypatch.setattr(step, "make_loss_scale", lambda _, device: Flagged(device))
    flags = ["--amp=fp16", "--mlperf-grad-accum-iter=2"]
    skipping, without = make_trainer("--on-nan=skip", *flags), make_trainer(*flags)
    first, bad, *others = make_batches(4)
    Flagged.is_set = overflows
    skipping.train_step(first, 1)
    without.progress.note_due(2, without.step.run(first, without.schedule.rate(1), 2, True)[1])
    Flagged.is_set = True
    skipping.train_step(spoilt(bad), 2)
    Flagged.is_set = False
    assert_same(skipping, without)
    for it, batch in enumerate(others, 3):
        skipping.train_step(batch, it)
        without.train_step(batch, it)
    assert_same(skipping, without)
