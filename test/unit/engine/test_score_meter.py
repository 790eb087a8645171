"""A ScoreMeter's metrics equal scikit-learn's, on any batches and ranks, in 4 bytes a row."""

import dataclasses
import json
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, shell
from sklearn import metrics as sk
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import score_meter
from engine.score_meter import Ranking, ScoreMeter, _sort
from ranks.process import Process
from reporting.metrics import Metrics

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
DTYPES = (torch.float32, torch.float64)


def scores_of(batches, process=ALONE):
    """Metrics of (predicted, label) batches."""
    meter = ScoreMeter(process)
    for batch in batches:
        meter.add(*batch)
    return meter.metrics()


def scored(scores, labels, dtype=torch.float32):
    return scores_of([(torch.tensor(scores, dtype=dtype), torch.tensor(labels, dtype=dtype))])


def wanted(scores, labels):
    """Scikit-learn's metrics of NumPy columns with both classes."""
    classes = np.round(scores)
    common = {"labels": [0, 1], "average": "binary", "zero_division": 0}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, classes, **common)
    return Metrics(
        accuracy=(classes == labels).mean(),
        recall=recall,
        precision=precision,
        f1=f1,
        ap=sk.average_precision_score(labels, scores),
        auc=sk.roc_auc_score(labels, scores) if np.ptp(labels) else np.nan,  # 1.4 raises
        log_loss=sk.log_loss(labels, scores.astype(np.float64), labels=[0, 1]),
        base_rate=labels.mean(dtype=np.float64),
    )


def assert_close(found, want):
    assert dataclasses.asdict(found) == pytest.approx(
        dataclasses.asdict(want), abs=1e-9, rel=0, nan_ok=True
    )


def cases(dtype):
    """{name: (scores, labels)}."""
    random = torch.Generator().manual_seed(5)
    smooth = torch.rand(1001, generator=random, dtype=dtype)
    ends = torch.tensor([0.0, -0.0, 1.0, 0.5, 1e-30, 1 - 2**-24], dtype=dtype)
    columns = {
        "smooth": smooth,
        "ties": (smooth * 8).round() / 8,
        "two_values": (smooth > 0.7).to(dtype) * 0.25 + 0.375,
        "all_equal": torch.full_like(smooth, 0.25),
        "ends": ends[torch.randint(len(ends), (1001,), generator=random)],
        "all_below_half": smooth / 2,
        "bad": 1 - smooth,
    }
    draws = torch.rand(1001, generator=random, dtype=dtype)
    return {name: (scores, (draws < smooth).to(dtype)) for name, scores in columns.items()}


@pytest.mark.parametrize("keys_at_a_time", [1, 7, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases(torch.float32))
def test_all_metrics_equal_scikit_learn(name, dtype, keys_at_a_time, monkeypatch):
    """Also if a group of equal scores spans parts."""
    monkeypatch.setattr(score_meter, "KEYS_AT_A_TIME", keys_at_a_time)
    scores, labels = cases(dtype)[name]
    assert_close(scores_of([(scores, labels)]), wanted(scores.numpy(), labels.numpy()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_scores_differ_and_both_zeros_are_equal(dtype):
    scores = torch.tensor([0.3, 0.3], dtype=dtype)
    scores[1] = torch.nextafter(scores[1], torch.ones((), dtype=dtype))
    assert scores_of([(scores, torch.tensor([0.0, 1.0]))]).auc == 1
    assert scores_of([(scores, torch.tensor([1.0, 0.0]))]).auc == 0
    assert scored([-0.0, 0.0], [0, 1], dtype).auc == scored([0.0, -0.0], [0, 1], dtype).auc == 0.5


def test_auc_is_the_exact_share_of_pairs():
    scores, labels = cases(torch.float32)["ties"]
    pairs = [
        (one > zero).item() + 0.5 * (one == zero).item()
        for one in scores[labels == 1]
        for zero in scores[labels == 0]
    ]
    assert scores_of([(scores, labels)]).auc == sum(pairs) / len(pairs)


def test_counts_of_four_billion_rows_fit():
    """No evaluation is that long: the counts start high, and only a group's start is given."""
    meter = ScoreMeter(ALONE)
    meter._counts += 4 * 10**9
    meter.add(torch.ones(1), torch.ones(1))
    assert set(meter._counts.tolist()) == {4 * 10**9 + 1}
    half = 2 * 10**9
    ranking = Ranking(2 * half, half)
    ranking._count_groups(torch.tensor([[half], [0]]))
    assert ranking.metrics(right=0).auc == 1


def test_a_half_is_a_prediction_of_0():
    found = scored([0.25, 0.5, 0.9], [0, 1, 1])
    assert (found.accuracy, found.recall, found.precision) == (2 / 3, 0.5, 1)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc_and_no_ap(label):
    scores = [0.25, 0.75, 0.5]
    found = scored(scores, [label] * 3)
    assert np.isnan(found.auc) and np.isnan(found.ap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns that there is one class
        want = wanted(np.array(scores), np.full(3, label))
    assert_close(dataclasses.replace(found, auc=0, ap=0), dataclasses.replace(want, auc=0, ap=0))


def test_a_single_row():
    found = scored([0.75], [1])
    assert found.log_loss == pytest.approx(-np.log(0.75))
    assert (found.accuracy, found.recall, found.base_rate) == (1, 1, 1)
    assert np.isnan(found.auc) and np.isnan(found.ap)


def test_labels_between_0_and_1_leave_only_the_accuracy():
    found = scored([0.2, 0.9, 0.4], [0, 1, 0.5])
    assert found.accuracy == 2 / 3
    assert np.isnan(found.numbers()[1:]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("label", [0, 0.5])
def test_a_score_that_is_not_finite_leaves_nothing(bad, label):
    assert np.isnan(scored([0.2, bad, 0.4], [0, label, 1]).numbers()).all()


@pytest.mark.parametrize("bad", [-0.25, 1.25])
def test_a_score_that_is_no_probability_is_refused(bad):
    with pytest.raises(AssertionError, match="outside"):
        scored([0.2, bad], [0, 1])


def test_an_evaluation_of_no_rows_is_refused():
    with pytest.raises(AssertionError, match="no rows"):
        scores_of([(torch.zeros(0, 1), torch.zeros(0, 1))])


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_batches_and_their_shape_do_not_matter(size):
    scores, labels = cases(torch.float32)["ties"]
    batches = [(torch.zeros(0, 1), torch.zeros(0, 1))]
    batches += zip(scores[:, None].split(size), labels[:, None].split(size), strict=True)
    assert scores_of(batches) == scores_of([(scores, labels)])


def test_scores_may_be_columns_of_others_and_need_a_gradient():
    scores, labels = cases(torch.float32)["smooth"]
    both = torch.stack([scores, labels], dim=1).requires_grad_()
    assert scores_of([(both[:, :1], both[:, 1:])]) == scores_of([(scores, labels)])


def test_narrow_floats_count_as_the_float32_they_equal():
    scores, labels = cases(torch.float32)["smooth"]
    narrow = scores.bfloat16()
    assert scores_of([(narrow, labels)]) == scores_of([(narrow.float(), labels)])


@pytest.mark.parametrize("dtype, num_bytes", [(torch.float32, 4), (torch.float64, 8)])
def test_a_row_takes_the_bytes_of_its_score(dtype, num_bytes):
    meter = ScoreMeter(ALONE)
    for _ in range(3):
        meter.add(torch.rand(100, 1, dtype=dtype), torch.ones(100, 1, dtype=dtype))
    assert sum(keys.untyped_storage().nbytes() for keys in meter._keys) == 300 * num_bytes


@pytest.mark.parametrize("rows_at_a_time", [1, 25, 1000])
def test_batches_that_wait_for_others_count_as_well(rows_at_a_time):
    scores, labels = cases(torch.float32)["smooth"]
    meter = ScoreMeter(ALONE)
    meter._rows_at_a_time = rows_at_a_time
    for batch in zip(scores.split(10), labels.split(10), strict=True):
        meter.add(*batch)
    meter.add(scores[:0], labels[:0])
    assert len(meter._keys) <= 1 + len(scores) // rows_at_a_time
    assert meter.metrics() == scores_of([(scores, labels)])


def test_adding_does_not_wait_for_the_device():
    """The host cannot read a tensor without values."""
    with FakeTensorMode():
        meter = ScoreMeter(ALONE)
        meter.add(torch.rand(100, 1), torch.ones(100, 1))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(meter._counts.sum())


def test_a_full_card_leaves_the_sort_to_the_host(monkeypatch):
    def full(keys):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "sort", full)
    on_card = types.SimpleNamespace(
        device=torch.device("cuda"), cpu=lambda: torch.tensor([3, 1, 2], dtype=torch.int32)
    )
    assert _sort(on_card).tolist() == [1, 2, 3]


# ---------------------------------------------------------------- ranks

NUM_RANKS = 3


def shared_cases():
    """{name: (scores, labels, rows at which they are cut between the ranks)}."""
    scores, labels = cases(torch.float32)["ties"]
    not_finite, halves = scores.clone(), labels.clone()
    not_finite[-1], halves[400] = float("nan"), 0.5
    return {
        "shares": (scores, labels, (334, 668)),
        "the_first_has_most": (scores, labels, (900, 990)),
        "the_last_has_most": (scores, labels, (1, 3)),
        "one_rank_without_rows": (scores, labels, (500, 500)),
        "float64": (scores.double(), labels.double(), (300, 999)),
        "a_single_row": (scores[:1], labels[:1], (1, 1)),
        "nan_on_one_rank": (not_finite, labels, (334, 668)),
        "half_a_label_on_one_rank": (scores, halves, (334, 668)),
    }


RANK_PROGRAM = """
import json, sys
import torch
from engine import score_meter
from forked_ranks import run_ranks
from ranks import process as ranks

score_meter.KEYS_AT_A_TIME = 50  # so that keys travel in many parts

def work():
    process = ranks.this_process("cpu")
    found = {}
    with ranks.joined(process):
        for name, (scores, labels, cuts) in torch.load("cases.pt").items():
            shares = scores.tensor_split(cuts), labels.tensor_split(cuts)
            meter = score_meter.ScoreMeter(process)
            for batch in zip(*(share[process.rank][:, None].split(60) for share in shares)):
                meter.add(*batch)
            found[name] = meter.metrics().numbers()
    with open(f"{process.rank}.json", "w") as file:
        json.dump(found, file)

run_ranks(int(sys.argv[1]), work)
"""


def test_every_rank_gets_what_one_rank_gets(tmp_path, monkeypatch):
    torch.save(shared_cases(), tmp_path / "cases.pt")
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    command = [sys.executable, "-c", RANK_PROGRAM, NUM_RANKS]
    finished = shell(*command, cwd=tmp_path, env=paths, timeout=100)
    assert finished.returncode == 0, finished.stderr[-3000:]
    monkeypatch.setattr(score_meter, "KEYS_AT_A_TIME", 50)
    for name, (scores, labels, _) in shared_cases().items():
        alone = scores_of([(scores, labels)]).numbers()
        for rank in range(NUM_RANKS):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            assert np.array_equal(found, alone, equal_nan=True), (name, rank)
