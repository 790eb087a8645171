"""--patience ends training after so many evaluations without a better model, on any way there."""

import re

import pytest
from conftest import CRITEO_MODEL, SMALL_MODEL, train

from checkpoints.json_values import as_json
from checkpoints.run_state import progress_of
from engine.progress import Progress

FLAGS = (
    "--nepochs=2 --test-freq=8 --print-freq=100 --learning-rate=1 --mlperf-events=false"
).split()


def run(kaggle, *flags):
    result = train(*CRITEO_MODEL, f"--data_path={kaggle}", *FLAGS, *flags)
    assert result.status == 0, result.err
    return result


@pytest.fixture(scope="module")
def aucs(kaggle):
    """AUCs of the run that nothing ends: two in a row that are no better, after one that was."""
    return [test["auc"] for test in run(kaggle).tests]


def num_until(aucs, patience):
    """Evaluations until so many in a row were not better than all before."""
    for last in range(patience, len(aucs)):
        if max(aucs[last - patience + 1 : last + 1]) <= max(aucs[: last - patience + 1]):
            return last + 1
    return len(aucs)


def said(result):
    """(its line, the line after it)"""
    found = re.search(r"^(no better .*)\n(.*)$", result.out, re.M)
    return found.groups() if found else ("", "")


def test_it_stops_after_so_many_evaluations_and_keeps_the_best_model(kaggle, aucs, tmp_path):
    num = num_until(aucs, 2)
    assert 3 < num < num_until(aucs, 3), "one was counted that a better one has forgiven"
    result = run(kaggle, "--patience=2", f"--save-model={tmp_path}/m.pth")
    assert [test["auc"] for test in result.tests] == aucs[:num]
    where = f"it {8 * (num - 2)} of epoch 0"
    assert said(result) == (
        f"no better AUC than {max(aucs[:num])} ({where}) in the last 2 evaluations:"
        " training stops (--patience)",
        f"best AUC {max(aucs[:num])} at {where}, saved in {tmp_path}/m.pth",
    )


def test_a_run_that_goes_on_counts_on(kaggle, aucs, tmp_path):
    """From a checkpoint between the two evaluations that end it, and from the one at its end."""
    saved, num = tmp_path / "saved", num_until(aucs, 2)
    keep = [f"--checkpoint-dir={saved}", "--save-every=4", "--keep=99", "--patience=2"]
    whole = run(kaggle, *keep)
    between, end = sorted(saved.glob("*-step-*"))[-2:]
    assert between.name.endswith("step-52") and end.name.endswith("step-55"), "47 and 47 + 8 end it"
    resumed = run(kaggle, f"--resume={between}", "--patience=2")
    assert resumed.tests == whole.tests[-1:] and said(resumed)[0] == said(whole)[0]
    again = run(kaggle, f"--resume={end}", "--patience=2")
    assert not again.tests and said(again)[0] == said(whole)[0]
    longer = run(kaggle, f"--resume={end}", "--patience=3")
    assert [test["auc"] for test in longer.tests] == aucs[num : num_until(aucs, 3)]


def test_a_model_file_counts_on_too(kaggle, tmp_path):
    """One that is made of a checkpoint: a run's own is that of its best evaluation."""
    saved, model = tmp_path / "saved", tmp_path / "m.pth"
    run(kaggle, f"--checkpoint-dir={saved}", "--save-every=4", "--keep=99", "--patience=2")
    between = sorted(saved.glob("*-step-*"))[-2]
    made = train(f"--export-checkpoint={between}", f"--save-model={model}")
    assert made.status == 0, made.err
    loaded = run(kaggle, f"--load-model={model}", "--patience=2")
    assert len(loaded.tests) == 1 and "before this run" in said(loaded)[0]


def test_accuracy_is_what_counts_without_mlperf_logging_and_a_threshold_may_come_first():
    flags = ["--test-freq=1", "--learning-rate=0", "--patience=1", "--print-freq=100"]
    result = train(*SMALL_MODEL, *flags)
    assert result.out.count("Testing") == 2
    assert re.match(r"no better accuracy than [\d.]+ % \(it 1 of epoch 0\) in", said(result)[0])
    both = train(*SMALL_MODEL, *flags, "--mlperf-acc-threshold=0.01")
    assert both.out.count("Testing") == 1 and "has reached the threshold" in both.out
    assert "no better accuracy" not in both.out


def test_mlperfs_log_says_that_it_is_no_success(kaggle):
    flags = ["--mlperf-events=true", "--patience=2", "--mlperf-auc-threshold=0.99"]
    result = run(kaggle, *flags)
    (stop,) = [line for line in result.out.splitlines() if '"run_stop"' in line]
    assert '"aborted"' in stop and said(result)[0] in stop


@pytest.mark.parametrize(
    "more, told",
    [
        ([], "this run has none: give --test-freq=N too"),
        (["--test-freq=2", "--performance"], "--performance: a measurement of speed"),
        (["--test-freq=2", "--patience=-1"], "at least 0"),
    ],
)
def test_patience_without_evaluations_is_a_mistake(more, told):
    result = train(*SMALL_MODEL, "--patience=3", *more)
    assert result.status == 2 and result.err.count("\n") == 1 and told in result.err
    assert "--patience" in result.err


def test_a_checkpoint_of_before_has_counted_nothing():
    values = as_json(vars(Progress(since_best_auc=3)))
    assert progress_of(values).since_best_auc == 3
    of_before = {name: value for name, value in values.items() if "since" not in name}
    assert progress_of(of_before).since_best_auc == 0
