"""A run evaluates when it is asked to, and thresholds end it."""

import re

import pytest
from conftest import CRITEO_MODEL, SMALL_MODEL, train


def test_an_evaluation_without_mlperf_logging_and_when_it_happens():
    result = train(*SMALL_MODEL, "--test-freq=4", "--print-freq=100")
    assert re.findall(r"it (\d+)/10", result.out) == ["4", "8", "10"]
    assert re.findall(
        r"Testing at - (\d+)/10 of epoch 0,\n accuracy [\d.]+ %, best [\d.]+ %\nlog loss",
        result.out,
    ) == ["4", "8", "10"]


@pytest.mark.parametrize("kind", ["auc", "acc"])
def test_a_threshold_stops_the_whole_run(kaggle, kind):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--nepochs=3", "--test-freq=10"]
    result = train(*flags, f"--mlperf-{kind}-threshold=0.51")
    assert result.status == 0 and "has reached the threshold 0.51: training stops" in result.out
    assert max(line[2] for line in result.losses) == 0
    first = next(
        k
        for k, t in enumerate(result.tests)
        if (t["auc"] if kind == "auc" else t["accuracy"] / 100) >= 0.51
    )
    assert len(result.tests) == first + 1


def test_unrounded_targets_have_an_accuracy_and_a_remark():
    result = train("--data-size=20", "--mini-batch-size=5", "--test-freq=4")
    assert result.status == 0 and "warning: labels are not 0 and 1" in result.out


def test_print_time_measures_and_wall_time_is_appended():
    result = train(*SMALL_MODEL, "--print-time", "--print-wall-time", "--print-freq=5")
    assert len(re.findall(r", \d+\.\d\d ms/it, loss [\d.]+ \(\d\d:\d\d\)\n", result.out)) == 2
    assert "-1.00 ms/it" in train(*SMALL_MODEL).out


def test_performance_stops_by_itself_and_does_not_evaluate():
    result = train(
        *SMALL_MODEL, "--performance", "--test-freq=2", "--print-freq=2", "--nepochs=100"
    )
    assert len(result.losses) == 11 and "Testing" not in result.out
    assert max(line[2] for line in result.losses) == 2


def test_num_batches_caps_a_data_set(kaggle):
    result = train(*CRITEO_MODEL, f"--data_path={kaggle}", "--num-batches=5", "--test-freq=3")
    assert [line[:2] for line in result.losses] == [(k, 5) for k in range(1, 6)]
    assert re.findall(r"Testing at - (\d+)/5", result.out) == ["3", "5"]


def test_tensor_board_debug_mode_and_profiling_write_what_they_promise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        *SMALL_MODEL,
        "--test-freq=5",
        "--debug-mode",
        "--enable-profiling",
        "--print-precision=3",
    ]
    result = train(*flags, f"--tensor-board-filename={tmp_path}/board")
    assert result.status == 0, result.err
    assert any((tmp_path / "board").iterdir())
    for word in (
        "Architecture(",
        "mini-batch: 0",
        "initial parameters",
        "updated parameters",
        "emb_l.0.weight",
    ):
        assert word in result.out
    assert "traceEvents" in (tmp_path / "dlrm_s_pytorch.json").read_text()
    assert "embedding_bag" in (tmp_path / "dlrm_s_pytorch.prof").read_text()


def test_random_weights_are_not_evaluated_in_silence(tmp_path):
    warning = "warning: --inference-only without --load-model evaluates random weights"
    path = tmp_path / "m.pth"
    assert warning in train(*SMALL_MODEL, "--inference-only").out
    assert warning not in train(*SMALL_MODEL, f"--save-model={path}", "--test-freq=10").out
    assert "random" not in train(*SMALL_MODEL, "--inference-only", f"--load-model={path}").out
