"""--metrics-file: whole lines of JSON with the keys that docs/reporting.md promises."""

import json
import os
import re

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, largest_file, train

from reporting.log_lines import StepPosition
from reporting.metrics import Metrics
from reporting.metrics_file import MetricsFile, read_lines
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.reporter import Listeners

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
ALL = "kind step epoch it time elapsed memory"
METRICS = "accuracy recall precision f1 ap auc log_loss base_rate"
KEYS = {
    "train": f"{ALL} loss lr rows_per_second ms_per_it",
    "evaluation": f"{ALL} {METRICS} best_accuracy best_auc num_rows rows_per_second",
    "end": f"{ALL} loss best_accuracy best_auc error",
}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of_step(step, loss=0.5):
    return TrainingRecord(StepPosition(step, 100, 0), loss, 0.1, 2.0, 1000.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch, then one that goes on from its model: (lines, result of the first)."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "m.jsonl"
    flags = [*SMALL_MODEL, f"--metrics-file={path}", "--print-freq=4", "--test-freq=5"]
    first = train(*flags, f"--save-model={folder}/m.pth", "--mlperf-logging")
    assert first.status == 0
    num_first = len(lines_of(path))
    second = train(*flags, f"--load-model={folder}/m.pth", "--nepochs=2")
    assert second.status == 0
    return lines_of(path), num_first, first


def test_each_line_has_the_documented_keys(run):
    page = (ROOT / "docs" / "reporting.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \| (all|[a-z, ]+) \|", page, re.M)
    told = {kind: set() for kind in KEYS}
    for names, kinds in rows:
        for kind in KEYS if kinds == "all" else kinds.split(", "):
            told[kind] |= set(re.findall(r"`(\w+)`", names))
    assert {line["kind"] for line in run[0]} == set(KEYS)
    for line in run[0]:
        wanted = set(KEYS[line["kind"]].split())
        assert set(line) == wanted == told[line["kind"]]
        assert set(line["memory"]) == {"host", "host_peak", "device", "device_peak"}


def test_the_numbers_are_those_of_the_log(run):
    lines, num_first, result = run
    lines = lines[:num_first]
    training = [line for line in lines if line["kind"] == "train"]
    found = [(line["it"], 10, line["epoch"], round(line["loss"], 6)) for line in training]
    assert found == result.losses
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [round(line["auc"], 4) for line in evaluations] == [t["auc"] for t in result.tests]
    assert lines[-1]["kind"] == "end" and lines[-1]["error"] is None
    assert lines[-1]["best_auc"] == max(line["auc"] for line in evaluations)
    assert all(line["lr"] == 0.1 and line["rows_per_second"] > 0 for line in training)
    assert all(line["ms_per_it"] > 0 for line in training)  # though --print-time is not given
    assert all(line["memory"]["host_peak"] >= line["memory"]["host"] > 1e6 for line in lines)


def test_a_run_that_goes_on_appends(run):
    lines, num_first, _ = run
    assert [line["step"] for line in lines[num_first:]][-3:] == [20, 20, 20]
    assert {line["kind"] for line in lines[num_first:]} == set(KEYS)


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "m"
    with MetricsFile(path, CPU, print) as file:
        where = StepPosition(3, 100, 2)
        file.training(TrainingRecord(where, NAN, 0.1, INF, 5.0))
        file.evaluation(EvaluationRecord(where, Metrics(0.5), 0.5, NAN, 10, 2.0))
    training, evaluation, end = lines_of(path)
    assert (training["step"], training["loss"], training["ms_per_it"]) == (203, None, None)
    assert evaluation["auc"] is None and evaluation["accuracy"] == 0.5
    assert evaluation["rows_per_second"] == 5 and end["loss"] is None


def test_an_error_is_told_once_in_one_line(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="two"), Listeners(MetricsFile(path, CPU, print)) as run:
        run.training(line_of_step(1))
        run.end_run()
        raise ValueError("two\nlines")
    assert [line["kind"] for line in lines_of(path)] == ["train", "end"]
    assert lines_of(path)[-1]["error"] == "ValueError: two lines"


def test_a_full_disk_is_one_warning_and_the_next_line_stands_alone(tmp_path):
    path, said = tmp_path / "m", []
    file = MetricsFile(path, CPU, said.append)
    file.training(line_of_step(1))
    with largest_file(path.stat().st_size + 40):
        file.training(line_of_step(2))
        file.training(line_of_step(3))
    file.training(line_of_step(4))
    assert len(said) == 1 and said[0].startswith(f"warning: --metrics-file={path} lacks lines (")
    assert [line["step"] for line in read_lines(path)] == [1, 4]


def test_a_line_that_was_cut_before_this_run_is_closed(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"kind": "train", "st')
    MetricsFile(path, CPU, print).training(line_of_step(5))
    assert [line["step"] for line in read_lines(path)] == [5]


def test_what_is_no_line_is_left_out(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b'\xff\n[1]\n7\n{"kind": 1}\n{"kind": "train", "step": 2}\n' + b"[" * 9999)
    assert list(read_lines(path)) == [{"kind": "train", "step": 2}]
    assert list(read_lines(path, num_bytes=12)) == [] == list(read_lines(tmp_path / "none"))


@pytest.mark.parametrize("flag", ["--metrics-file", "--report"])
def test_a_file_that_cannot_be_written_ends_the_run_before_it_begins(flag, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, what in (("folder", "is a folder"), ("none/m", "its folder does not exist")):
        result = train(*SMALL_MODEL, f"{flag}={tmp_path}/{name}")
        assert result.status == 2 and result.out == ""
        assert result.err.startswith(f"error: {flag}={tmp_path}/{name}") and what in result.err
        assert result.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["folder"]


def test_both_flags_cannot_name_one_file(tmp_path):
    result = train(*SMALL_MODEL, f"--metrics-file={tmp_path}/x", f"--report={tmp_path}/x")
    assert result.status == 2 and "name two files" in result.err
