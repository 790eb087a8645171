"""What a log says at the end: numbers where there are some, `none` where there are none."""

import pytest
from conftest import break_package

from reporting import results
from reporting.results import final_result, main, summarise

LINE = "Finished training it {it}/100 of epoch 0, {ms} ms/it, loss {loss}\n"
TEST = "recall 0.1, precision 0.2, f1 0.1, ap 0.3, auc {auc}, best auc 1, accuracy 75.5 %, best 1\n"


def report(tmp_path, log, *more):
    (tmp_path / "train_0.log").write_text(log)
    path = tmp_path / "DLRM_bs64_2p_acc.log"
    argv = [f"--results={path}", "--batch-size=64", "--ranks=2", "--device=cpu", "--seconds=9"]
    status = main([str(tmp_path / "train_0.log"), *argv, *more])
    if not path.is_file():
        return status, {}
    return status, dict(line.split(" = ") for line in path.read_text().splitlines())


def test_values_that_are_there_are_numbers(tmp_path, capsys):
    log = "".join(LINE.format(it=it, ms=ms, loss=0.5) for it, ms in ((1, 90), (2, 10), (3, 30)))
    status, facts = report(tmp_path, log + TEST.format(auc=0.7512))
    assert status == 0
    assert (facts["ActualFPS"], facts["TrainAccuracy"]) == ("3200.00", "0.7512")
    assert facts["ActualLoss"] == "0.500000"
    printed = capsys.readouterr().out
    assert "images/sec : 3200.00\nFinal Train Accuracy : 0.7512\n" in printed


def test_lines_that_a_resumed_run_prints_again_count_once():
    """The steps after the last checkpoint of a killed run are trained again, and told again."""
    before = [LINE.format(it=it, ms=10, loss=it) for it in (10, 20, 30)]
    after = [LINE.format(it=it, ms=20, loss=it + 0.5) for it in (20, 30)]
    test = TEST.format(auc=0.5)
    summary = summarise("".join([before[0], test, before[1], test, before[2], *after[:1], test,
                                 *after[1:]]))  # fmt: skip
    assert summary.steps == [10, 20, 30] and summary.losses == [10, 20.5, 30.5]
    assert summary.ms_per_it == [10, 20, 20]
    assert summary.test_steps == [10, 20] and len(summary.aucs) == len(summary.accuracies) == 2


def test_values_that_are_missing_are_none(tmp_path, capsys):
    """A training without evaluations and with one line; an evaluation without training."""
    status, facts = report(tmp_path, LINE.format(it=1, ms=-1, loss=0.25))
    assert status == 0 and facts["ActualLoss"] == "0.250000"
    assert facts["ActualFPS"] == facts["TrainAccuracy"] == "none"
    status, facts = report(tmp_path, TEST.format(auc="nan"))
    assert status == 0 and facts["TrainAccuracy"] == "0.7550"
    assert facts["ActualFPS"] == facts["ActualLoss"] == "none"
    printed = capsys.readouterr().out
    assert "Performance images/sec : none\nFinal Train Accuracy : none\n" in printed
    assert "nan" not in printed and "nan" not in final_result(float("nan"), float("nan"), 0)


@pytest.mark.parametrize("bayes", [[], ["--bayes-auc=0.83"]])
@pytest.mark.parametrize("tests", ["", TEST.format(auc="nan"), TEST.format(auc=0.8)])
def test_there_is_a_picture_whatever_the_log_has(bayes, tests, tmp_path):
    log = LINE.format(it=1, ms=1, loss="nan") + tests + LINE.format(it=2, ms=1, loss=0.5)
    status, _ = report(tmp_path, log, f"--plot={tmp_path}/x.png", *bayes)
    assert status == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_log_losses_go_with_the_evaluations_that_printed_them():
    calibration = "log loss 0.45, base rate 0.2\n"
    log = calibration + LINE.format(it=1, ms=1, loss=1) + TEST.format(auc=0.8)
    log += LINE.format(it=2, ms=1, loss=1) + TEST.format(auc=0.9) + calibration
    summary = summarise(log)
    assert str(summary.log_losses) == "[nan, 0.45]" and summary.aucs == [0.8, 0.9]


def test_a_picture_without_matplotlib_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    """It is missing, or it is there and cannot be imported."""
    plot = f"--plot={tmp_path}/x.png"
    with monkeypatch.context() as patch:
        patch.setattr(results, "problem_of_import", lambda name, _: f"{name} is not installed")
        assert report(tmp_path, LINE.format(it=1, ms=1, loss=1), plot) == (2, {})
    assert capsys.readouterr().err == "error: matplotlib is not installed\n"
    break_package(tmp_path / "packages", monkeypatch, "matplotlib", "OSError('no such library')")
    assert report(tmp_path, LINE.format(it=1, ms=1, loss=1), plot) == (2, {})
    err = capsys.readouterr().err
    assert "cannot be imported (OSError: no such library): install it anew" in err
    assert err.count("\n") == 1


def test_a_log_without_lines_is_an_error(tmp_path, capsys):
    assert report(tmp_path, "nothing\n") == (2, {})
    assert "nothing was trained" in capsys.readouterr().err
    assert summarise("") == results.LogSummary()


def test_seconds_are_printed_whole():
    assert final_result(1, 2, 3).endswith("E2E Training Duration sec : 3")


@pytest.mark.parametrize("flag", ["--batch-size=0", "--seconds=x"])
def test_flags_are_checked(flag, tmp_path, capsys):
    assert report(tmp_path, LINE.format(it=1, ms=1, loss=1), flag)[0] == 2
    assert capsys.readouterr().err.count("\n") == 1
