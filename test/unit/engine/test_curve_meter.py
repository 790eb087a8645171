"""The curves of a report are scikit-learn's, at the scores that are kept, however rows are cut."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from engine import score_meter
from engine.curve_meter import CURVE_STEPS, CurveMeter
from engine.score_meter import ScoreMeter
from ranks.process import Process
from reporting.score_curves import CALIBRATION_BINS, SCORE_BINS

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")


def rows_of(kind, num_rows, dtype=np.float32):
    random = np.random.default_rng(7)
    scores = random.beta(1, 6, num_rows).astype(dtype)
    if kind == "ties":
        scores = np.round(scores * 20).astype(dtype) / 20  # on the edges of bins, too
    elif kind == "a few scores":
        scores = random.choice(np.array([0, 0.025, 0.5, 1], dtype), num_rows)
    labels = (random.random(num_rows) < scores**0.7).astype(dtype)
    return scores, labels


def curves_of(scores, labels):
    meter = ScoreMeter(ALONE, with_curves=True)
    for begin in range(0, len(scores), 1000):
        part = slice(begin, begin + 1000)
        meter.add(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    return meter.metrics(), meter.curves


@pytest.fixture(params=["any", "ties", "a few scores"])
def rows(request, monkeypatch):
    monkeypatch.setattr(score_meter, "KEYS_AT_A_TIME", 701)  # many parts
    return rows_of(request.param, 20_000)


def test_roc_and_precision_recall_are_scikit_learns_at_the_kept_scores(rows):
    scores, labels = rows
    _, curves = curves_of(scores, labels)
    false, true, thresholds = sk.roc_curve(labels, scores, drop_intermediate=False)
    wanted = {t: (f, h) for f, h, t in zip(false, true, thresholds, strict=True)}
    own = list(zip(*curves.roc(), strict=True))
    assert own[-1] == (0, 0) and own[0] == (1, 1)
    for threshold, point in zip(curves.thresholds, own[:-1], strict=True):
        assert point == pytest.approx(wanted[threshold], abs=1e-12)
    precision, recall, thresholds = sk.precision_recall_curve(labels, scores)
    wanted = dict(zip(thresholds, zip(recall[:-1], precision[:-1], strict=True), strict=True))
    own = zip(*curves.precision_recall(), strict=True)
    for threshold, point in zip(curves.thresholds, own, strict=True):
        assert point == pytest.approx(wanted[threshold], abs=1e-12)


def test_what_is_kept_is_little_and_close_to_all(rows):
    scores, labels = rows
    metrics, curves = curves_of(scores, labels)
    num_points = len(curves.thresholds)
    assert num_points <= 2 * CURVE_STEPS + 2
    assert num_points == len(set(curves.thresholds)) and sorted(curves.thresholds)
    if len(set(scores.tolist())) < 5:  # each of them has many rows
        assert curves.thresholds == sorted(set(scores.tolist()))
    false, true = curves.roc()
    area = -np.trapezoid(true, false) if hasattr(np, "trapezoid") else -np.trapz(true, false)
    assert area == pytest.approx(metrics.auc, abs=1e-3)


def test_calibration_and_histogram_are_scikit_learns(rows):
    scores, labels = rows
    _, curves = curves_of(scores, labels)
    share, mean = calibration_curve(labels, scores, n_bins=CALIBRATION_BINS, strategy="uniform")
    bins = curves.calibration()
    assert [b.rate for b in bins] == pytest.approx(share.tolist(), abs=1e-12)
    assert [b.score for b in bins] == pytest.approx(mean.tolist(), abs=1e-7)
    assert sum(b.num_rows for b in bins) == len(scores)
    edges = np.linspace(0, 1, SCORE_BINS + 1)
    for label, counts in ((0, curves.zeros), (1, curves.ones)):
        numbers = np.searchsorted(edges[1:-1], scores[labels == label].astype(np.float64))
        assert list(counts) == np.bincount(numbers, minlength=SCORE_BINS).tolist()


def test_parts_change_nothing(monkeypatch):
    scores, labels = rows_of("ties", 5000)
    whole = curves_of(scores, labels)[1]
    for size in (1, 13):
        monkeypatch.setattr(score_meter, "KEYS_AT_A_TIME", size)
        parts = curves_of(scores[:700], labels[:700])[1]
        monkeypatch.setattr(score_meter, "KEYS_AT_A_TIME", 10_000)
        together = curves_of(scores[:700], labels[:700])[1]
        assert vars(parts) | {"sums": 0} == vars(together) | {"sums": 0}
        assert parts.sums == pytest.approx(together.sums)
    assert whole.num_rows == 5000


def test_no_more_points_than_a_picture_needs_whatever_the_number_of_rows():
    label = torch.arange(300_000) % 7 == 0
    meter = CurveMeter(len(label), int(label.sum()))
    meter.add(torch.linspace(0, 1, len(label), dtype=torch.float64), label.long())
    assert CURVE_STEPS <= len(meter.curves().thresholds) <= 2 * CURVE_STEPS + 2


def test_one_class_has_bins_but_no_roc():
    scores, _ = rows_of("any", 500)
    metrics, curves = curves_of(scores, np.zeros_like(scores))
    assert np.isnan(metrics.auc) and not curves.has_both_labels
    assert sum(curves.zeros) == 500 and sum(curves.ones) == 0


@pytest.mark.parametrize("spoilt", [np.nan, 0.5])
def test_scores_or_labels_without_metrics_have_no_curves(spoilt):
    scores, labels = rows_of("any", 500)
    (scores if np.isnan(spoilt) else labels)[3] = spoilt
    assert curves_of(scores, labels)[1] is None


def test_nothing_is_collected_unless_it_is_asked_for():
    meter = ScoreMeter(ALONE)
    meter.add(torch.rand(9), torch.ones(9))
    meter.metrics()
    assert meter.curves is None
