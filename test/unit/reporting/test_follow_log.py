"""A log on a terminal: its lines are whole, and the bar below tells what they tell."""

import io
import json

import pytest

from reporting.follow_log import Pace, Plan, Screen, follow, is_running, main
from reporting.log_lines import StepPosition, training_line

FLAGS = {"--mini-batch-size": 128, "--nepochs": 3, "--performance": False}
LINES = [
    "Prepared 7003 rows",
    training_line(StepPosition(10, 40, 0), 500.0, 0.5),
    training_line(StepPosition(20, 40, 0), 500.0, 0.5),
    "Testing at - 20/40 of epoch 0,",
    training_line(StepPosition(10, 40, 1), 250.0, 0.5),
]


def pace_of(line, seen=0.0, before=None):
    return Pace.from_line(line, seen, before)


def visible(text):
    """What a terminal shows of a text that overwrites the beginning of its lines."""
    lines = []
    for line in text.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


@pytest.mark.parametrize("seconds, step", [(0, 20), (2.4, 24), (60, 30)])
def test_between_lines_the_bar_moves_at_their_pace_and_not_beyond_the_next(seconds, step):
    first = pace_of(LINES[1])
    second = pace_of(LINES[2], 100.0, first)
    assert second.step_at(100.0 + seconds) == step


def test_the_last_step_of_an_epoch_is_the_most_and_an_epoch_begins_anew():
    last = pace_of(training_line(StepPosition(35, 40, 0), 1.0, 0.5), 0.0, pace_of(LINES[1]))
    assert last.step_at(999.0) == 40
    assert pace_of(LINES[4], 0.0, last).stride == 10
    not_timed = pace_of(training_line(StepPosition(35, 40, 0), 0.0, 0.5))
    assert not_timed.step_at(999.0) == 35 and not_timed.text_at(0.0, Plan(128, 3)) == ""


def test_rows_a_second_and_the_time_that_is_left_are_those_of_all_epochs():
    second = pace_of(LINES[2], 0.0, pace_of(LINES[1]))
    assert second.text_at(0.0, Plan(128, 3)) == "256 rows/s, 00:50 of training left"
    assert second.text_at(5.0, Plan(128, 3)) == "256 rows/s, 00:45 of training left"
    assert second.text_at(0.0, Plan(128, 0)) == "256 rows/s"
    assert second.text_at(0.0, Plan()) == ""


def test_lines_of_other_kinds_have_no_pace():
    assert pace_of(LINES[0]) is None and pace_of(LINES[3]) is None
    assert pace_of("Finished training it 1/2 of epoch 0, -1.00 ms/it, loss 0.5") is None


@pytest.mark.parametrize(
    "content, plan",
    [
        ({"flags": {}, "defaults": FLAGS}, Plan(128, 3)),
        ({"flags": {"--nepochs": 9}, "defaults": FLAGS}, Plan(128, 9)),
        ({"flags": {"--performance": True}, "defaults": FLAGS}, Plan(128, 0)),
        ({"flags": {}}, Plan()),
        ([], Plan()),
        ({"flags": [], "defaults": {"--nepochs": "x"}}, Plan()),
    ],
)
def test_the_flags_of_the_run_tell_its_rows_and_epochs(tmp_path, content, plan):
    assert Plan.from_folder(tmp_path) == Plan()
    (tmp_path / "flags.json").write_text(json.dumps(content))
    assert Plan.from_folder(tmp_path) == plan


class Growing:
    """A log that grows by a piece at each look; its writer lives as long."""

    def __init__(self, *pieces):
        self.pieces = list(pieces)

    def read(self):
        return self.pieces.pop(0) if self.pieces else ""

    def is_alive(self):
        return bool(self.pieces)


def test_the_terminal_has_the_logs_lines_and_at_the_end_no_bar(tmp_path, monkeypatch):
    """Pieces end within a line, and one of them comes when the writer has gone."""
    monkeypatch.setattr("reporting.follow_log.SECONDS_BETWEEN_LOOKS", 0)
    (tmp_path / "flags.json").write_text(json.dumps({"flags": {}, "defaults": FLAGS}))
    text = "\n".join(LINES) + "\nlast line"
    terminal, log = io.StringIO(), Growing(text[:30], "", text[30:100], "", "", text[100:])
    follow(log, log.is_alive, Screen(terminal, tmp_path))
    shown = terminal.getvalue()
    assert visible(shown) == [*LINES, "last line", ""]
    assert "epoch 0  50%|" in shown and "| 20/40, 256 rows/s, 00:50 of training left" in shown
    assert "epoch 1  25%|" in shown


def test_a_log_without_training_has_no_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("reporting.follow_log.SECONDS_BETWEEN_LOOKS", 0)
    terminal, log = io.StringIO(), Growing("one\n", "", "two\n")
    follow(log, log.is_alive, Screen(terminal, tmp_path))
    assert terminal.getvalue() == "one\ntwo\n"


def test_as_a_program_it_ends_with_the_process_and_begins_at_a_line(tmp_path, capsys):
    nobody = next(pid for pid in range(4_000_000, 5_000_000) if not is_running(pid))
    (tmp_path / "train_0.log").write_bytes(b"one\ntwo \xff\n")
    flags = [f"{tmp_path}/train_0.log", "--from-line=2", f"--pid={nobody}"]
    assert main(flags) == 0 and capsys.readouterr().out == "two \ufffd\n"
    assert main([f"{tmp_path}/none.log", f"--pid={nobody}"]) == 2
    assert "none.log: cannot read the log (No such file" in capsys.readouterr().err
