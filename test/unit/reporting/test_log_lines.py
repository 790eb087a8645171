"""Log lines have the frozen format, and a log is summarised."""

import pytest
from conftest import train

from reporting.log_lines import (
    StepPosition,
    accuracy_line,
    best_line,
    calibration_line,
    evaluation_line,
    metric_text,
    metrics_line,
    saved_line,
    training_line,
)
from reporting.metrics import Metrics, remark
from reporting.results import main, summarise


def test_a_remark_tells_what_to_be_wary_of():
    """It warns of one class, of an AUC of chance and of labels other than 0 and 1."""
    common = {"accuracy": 0.75, "log_loss": 0.5}
    one_class = Metrics(**common, recall=0, precision=0, f1=0, base_rate=0.0)
    assert "all labels are 0: auc and ap do not exist" in remark(one_class)
    assert "all labels are 1" in remark(Metrics(**common, base_rate=1.0))
    for auc in (0.25, 0.5):
        chance = Metrics(**common, auc=auc, base_rate=0.25)
        assert f"auc {auc:.4f} is not above 0.5" in remark(chance)
    assert remark(Metrics(**common, auc=0.51, base_rate=0.25)) == ""
    assert "labels are not 0 and 1" in remark(Metrics(0.75))


def test_lines_have_the_contracts_format():
    found = Metrics(0.75827, 0.2083, 0.6091, 0.3104, 0.4951, 0.7302, 0.45, 0.25)
    assert training_line(StepPosition(1024, 306969, 0), 51.24, 0.4532612) == (
        "Finished training it 1024/306969 of epoch 0, 51.24 ms/it, loss 0.453261"
    )
    assert training_line(StepPosition(1, 2, 0), -1, 1.0, "09:05").endswith(
        ", -1.00 ms/it, loss 1.000000 (09:05)"
    )
    assert evaluation_line(StepPosition(1024, 306969, 0)) == "Testing at - 1024/306969 of epoch 0,"
    assert accuracy_line(found, 0.78123) == " accuracy 75.827 %, best 78.123 %"
    line = metrics_line(found, 0.75827, 0.7302)
    assert line == (
        "recall 0.2083, precision 0.6091, f1 0.3104, ap 0.4951, auc 0.7302, best auc 0.7302,"
        " accuracy 75.827 %, best accuracy 75.827 %"
    )
    assert line.split()[9].rstrip(",") == "0.7302", "awk's blank-field 10 is the AUC"
    assert calibration_line(found) == "log loss 0.450000, base rate 0.250000"


LAST_LINES = {
    best_line(metric_text(0.8151, True), 0, 10240, "saved in DLRM.pth"): (
        "best AUC 0.8151 at it 10240 of epoch 0, saved in DLRM.pth"
    ),
    best_line(metric_text(0.78123, False), 2, 8, "not saved (no --save-model)"): (
        "best accuracy 78.123 % at it 8 of epoch 2, not saved (no --save-model)"
    ),
    best_line(metric_text(0.8, True), 0, 0, "nothing better to save in DLRM.pth"): (
        "best AUC 0.8000 before this run, nothing better to save in DLRM.pth"
    ),
    saved_line(1, 640, "DLRM.pth"): "model of it 640 of epoch 1 saved in DLRM.pth",
}


def test_the_last_line_is_none_that_scripts_look_for():
    log = training_line(StepPosition(10, 20, 0), 900.0, 0.5)
    for line, expected in LAST_LINES.items():
        assert line == expected
        assert "auc" not in line
        assert not line.startswith(("Finished training it", " accuracy", "recall", "Testing at"))
        assert summarise(f"{log}\n{line}\n") == summarise(log)


def test_awk_finds_time_and_loss_by_comma():
    fields = training_line(StepPosition(8, 9, 1), 12.345, 0.5).split(",")
    assert fields[1].split()[0] == "12.35" or fields[1].split()[0] == "12.34"
    assert fields[2].split() == ["loss", "0.500000"]


def test_a_log_is_summarised_and_its_first_line_left_out(tmp_path):
    log = "\n".join([
        training_line(StepPosition(10, 20, 0), 900.0, 0.5),
        training_line(StepPosition(20, 20, 0), 100.0, 0.4),
        evaluation_line(StepPosition(20, 20, 0)),
        metrics_line(Metrics(0.8, auc=0.7), 0.8, 0.75),
        training_line(StepPosition(10, 20, 1), 300.0, 0.3),
        evaluation_line(StepPosition(10, 20, 1)),
        accuracy_line(Metrics(0.81), 0.82),
    ])  # fmt: skip
    summary = summarise(log)
    assert summary.steps == [10, 20, 30] and summary.test_steps == [20, 30]
    assert summary.images_per_second(64) == pytest.approx(64 * 1000 / 200)
    assert summary.train_accuracy() == 0.7 and summary.accuracies == [0.8, 0.81]
    path = tmp_path / "train_0.log"
    path.write_text(log)
    done = train(
        path, f"--results={tmp_path}/DLRM_bs64_2p_acc.log", f"--plot={tmp_path}/p.png",
        "--batch-size=64", "--ranks=2", "--device=cpu", "--seconds=12", program=main,
    )  # fmt: skip
    assert done.status == 0
    assert done.out == (
        "------------------ Final result ------------------\n"
        "Final Performance images/sec : 320.00\n"
        "Final Train Accuracy : 0.7000\nE2E Training Duration sec : 12\n"
    )
    assert (tmp_path / "DLRM_bs64_2p_acc.log").read_text() == (
        "Network = DLRM\nRankSize = 2\nBatchSize = 64\nDeviceType = cpu\n"
        "CaseName = DLRM_bs64_2p_acc\n"
        "ActualFPS = 320.00\nTrainAccuracy = 0.7000\nActualLoss = 0.300000\n"
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
