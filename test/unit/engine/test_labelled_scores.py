"""Metrics in bounded memory are those that an evaluation has in memory."""

import numpy as np
import pytest
import torch

from engine import labelled_scores
from engine.labelled_scores import LabelledScores
from engine.score_meter import ScoreMeter
from ranks.process import Process

SOME = np.random.default_rng(1)
ROWS = 5000
CASES = {
    "spread": SOME.random(ROWS, np.float32),
    "ties": np.round(SOME.random(ROWS), 1).astype(np.float32),
    "equal": np.full(ROWS, 0.25, np.float32),
    "narrow": (0.3 + 1e-6 * SOME.random(ROWS)).astype(np.float32),  # one bin of many keys
    "edges": SOME.choice(np.array([0, -0.0, 1, 0.5], np.float32), ROWS),
}


def in_memory(scores, labels):
    meter = ScoreMeter(Process(0, 1, 0, torch.device("cpu"), "gloo"))
    meter.add(torch.from_numpy(scores), torch.from_numpy(labels).float())
    return meter.metrics()


@pytest.mark.parametrize("keys_per_run", [64, 1000, ROWS, 10 * ROWS])
@pytest.mark.parametrize("case", CASES)
def test_runs_of_any_length_give_the_metrics_of_all(case, keys_per_run, tmp_path, monkeypatch):
    monkeypatch.setattr(labelled_scores, "KEYS_PER_PART", 100)
    scores = CASES[case]
    labels = (SOME.random(ROWS) < 0.2 + 0.5 * np.abs(scores)).astype(np.int32)
    meter = LabelledScores(tmp_path, keys_per_run)
    for begin in range(0, ROWS, 77):
        meter.add(scores[begin : begin + 77], labels[begin : begin + 77])
    found, expected = meter.metrics(), in_memory(scores, labels)
    assert found.auc == expected.auc and found.accuracy == expected.accuracy
    np.testing.assert_allclose(found.numbers(), expected.numbers(), rtol=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_no_part_has_many_more_keys_than_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled_scores, "KEYS_PER_PART", 100)
    sizes = []
    add = labelled_scores.Ranking.add
    monkeypatch.setattr(
        labelled_scores.Ranking,
        "add",
        lambda self, keys: (sizes.append(len(keys)), add(self, keys)),
    )
    for case in CASES.values():
        meter = LabelledScores(tmp_path, 500)
        meter.add(case, np.arange(ROWS) % 2)
        meter.metrics()
    assert sum(sizes) == ROWS * len(CASES) and max(sizes) <= 200


def test_scores_that_are_not_finite_have_no_metrics(tmp_path):
    meter = LabelledScores(tmp_path)
    meter.add(np.array([0.5, np.nan], np.float32), np.array([0, 1]))
    assert np.isnan(meter.metrics().numbers()).all()
