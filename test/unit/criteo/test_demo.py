"""The demo data set: Criteo's raw format, a planted model, and how far training gets."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import train
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from criteo.demo import BayesAuc, PlantedModel, hash_values
from data_utils import main


def make(folder, *flags):
    return train(f"--make-demo={folder}", *flags, program=main)


def test_files_have_the_raw_format(tmp_path):
    result = make(tmp_path / "d", "--demo-rows=20001", "--demo-days=3")
    assert result.status == 0 and re.search(r"Bayes AUC 0\.\d{4}", result.out)
    lines = [(tmp_path / "d" / f"day_{day}").read_text().splitlines() for day in range(3)]
    assert [len(day) for day in lines] == [6667, 6667, 6667]
    fields = [line.split("\t") for day in lines for line in day]
    assert {len(row) for row in fields} == {40} and {row[0] for row in fields} == {"0", "1"}
    integers = [row[1:14] for row in fields]
    assert any("" in row for row in integers) and any(
        int(word) < 0 for row in integers for word in row if word
    )
    values = [{row[column] for row in fields} for column in range(14, 40)]
    assert all(re.fullmatch("[0-9a-f]{8}|", value) for column in values for value in column)
    assert any(value >= "f0000000" for column in values for value in column)
    distinct = sorted(len(column) for column in values)
    assert distinct[0] <= 5 and distinct[-1] > 2000
    common = Counter(row[16] for row in fields).most_common(1)[0][1]
    assert common > 100, "a few categories take many rows, even of a table of millions"


def test_the_seed_decides_every_row(tmp_path):
    assert make(tmp_path / "a", "--demo-rows=5000").status == 0
    assert make(tmp_path / "b", "--demo-rows=5000").status == 0
    assert make(tmp_path / "c", "--demo-rows=5000", "--demo-seed=2").status == 0
    days = [(tmp_path / name / "day_3").read_bytes() for name in "abc"]
    assert days[0] == days[1] != days[2]


def test_bayes_auc_is_that_of_the_planted_probabilities():
    random = np.random.default_rng(0)
    probability = random.random(40000) ** 2
    label = random.random(40000) < probability
    auc = BayesAuc()
    auc.add(probability[:1000]), auc.add(probability[1000:])
    assert auc.value() == pytest.approx(roc_auc_score(label, probability), abs=0.006)


def test_a_demo_does_not_overwrite_and_is_written_whole_or_not(tmp_path):
    (tmp_path / "d").mkdir()
    assert make(tmp_path / "d", "--demo-rows=1000").status == 0, "an empty folder may be there"
    again = make(tmp_path / "d", "--demo-rows=1000")
    assert again.status == 2 and "holds day files already" in again.err
    (tmp_path / "e").write_text("a file")
    refused = make(tmp_path / "e", "--demo-rows=1000")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "e"]


def test_distinct_values_have_distinct_hashes():
    values = np.arange(200000, dtype=np.uint64)
    assert len(np.unique(hash_values(values, np.uint64(77)))) == 200000


def test_the_integers_alone_leave_room_below_bayes():
    """A logistic regression on them stays at least 0.05 AUC below; test_scripts trains a DLRM."""
    numbers, _, missing, probability = PlantedModel(seed=1).draw(100_000)
    bayes = BayesAuc()
    bayes.add(probability)
    integers = np.where(missing[:, 1:14], 0, np.maximum(numbers[:, 1:], 0))
    fitted = LogisticRegression(max_iter=300).fit(np.log1p(integers[::2]), numbers[::2, 0])
    score = fitted.predict_proba(np.log1p(integers[1::2]))[:, 1]
    assert 0.6 < roc_auc_score(numbers[1::2, 0], score) <= bayes.value() - 0.05
