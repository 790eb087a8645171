"""The bar draws on terminals only: loss, rows, rows a second, the time that is left."""

import io
import sys

import pytest
from conftest import SMALL_MODEL

import dlrm_s_pytorch as dlrm
from reporting.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_training_shows_its_rows_loss_and_evaluations(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = ["--test-freq=4", "--print-freq=1", "--tensor-board-filename="]
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    assert dlrm.main([*SMALL_MODEL, *flags, "--data-size=1280"]) == 0
    drawn = terminal.getvalue()
    assert "epoch 0:" in drawn and "/1.28k" in drawn and "loss=0." in drawn
    assert "evaluation:" in drawn and " rows/s" in drawn
    lines = [line.rpartition("\r")[2].replace("\x1b[A", "") for line in drawn.split("\n")]
    assert sum(line.startswith("Finished training it") for line in lines) == 20


def test_nothing_is_drawn_in_a_pipe_or_without_a_stdout(monkeypatch, capfd):
    for stdout in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        with ProgressBar("work", 10) as bar:
            bar.update(3)
            bar.note(loss="1")
        assert not (stdout and stdout.getvalue())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("num_rows", [100, None])
def test_it_draws_on_another_terminal_than_stdout(num_rows, capfd):
    terminal = Terminal()
    with ProgressBar("predicting", num_rows, num_done=10, file=terminal) as bar:
        bar.note(auc="0.8")
        bar._bar.mininterval = bar._bar.delay = 0
        bar._bar.miniters = 1
        bar.update(15)
    drawn = terminal.getvalue()
    assert "predicting: " in drawn and "25" in drawn and "auc=0.8" in drawn
    assert ("25.0/100" in drawn) == bool(num_rows)
    assert drawn.rpartition("\r")[0].endswith(" ")  # it has been wiped
    assert capfd.readouterr() == ("", "")
