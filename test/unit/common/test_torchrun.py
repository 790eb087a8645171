"""Under torchrun an error is said once, at the end of its report, and one rank is reported."""

import json
import os
import re
import sys
import threading
import time

import pytest
from conftest import ROOT, SMALL_MODEL, shell

from common import torchrun
from common.errors import PassingError, RankError, RankGoneError, UserError, reports_errors


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Makes this process a rank of two; returns the folder that holds the ranks' folders."""

    def become(local_rank):
        (tmp_path / str(local_rank)).mkdir(exist_ok=True)
        values = {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "none"}
        values[torchrun.ERROR_FILE] = tmp_path / str(local_rank) / "error.json"
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        return tmp_path

    monkeypatch.setattr(torchrun, "SECONDS_FOR_FIRST_RANK", 0.2)
    monkeypatch.setattr(torchrun, "SECONDS_FOR_OTHER_RANKS", 0.2)
    return become


def end_with(error):
    @reports_errors
    def main(argv=None):
        raise error

    return main()


def left(folder):
    message = json.loads((folder / "0" / "error.json").read_text())["message"]
    return message["message"], int(message["extraInfo"]["timestamp"])


def test_the_first_rank_leaves_the_line_and_prints_it_where_no_torchrun_does(launched, capsys):
    folder = launched(0)
    assert end_with(UserError("all find it")) == 2
    assert left(folder)[0] == "error: all find it"
    assert capsys.readouterr().err == "error: all find it\n"


def test_another_rank_ends_without_failing_once_the_first_one_has_left_its_line(launched, capsys):
    folder = launched(1)
    (folder / "0").mkdir()
    writer = threading.Timer(0.1, (folder / "0" / "error.json").write_text, ["{}"])
    writer.start()
    assert end_with(UserError("all find it")) == 0 and capsys.readouterr().err == ""
    assert (folder / "1" / "ending").read_text() == str(os.getpid())


def test_a_first_rank_that_says_nothing_has_not_found_the_mistake(launched, capsys):
    launched(1)
    assert end_with(UserError("all find it")) == 2
    assert capsys.readouterr().err == "error: all find it\n"


def test_a_rank_that_waits_can_be_interrupted(launched, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    launched(1)
    monkeypatch.setattr(torchrun.time, "sleep", interrupt)
    assert end_with(UserError("all find it")) == 2


def test_the_first_rank_waits_until_the_others_have_gone(launched, monkeypatch):
    folder = launched(0)
    (folder / "1").mkdir()
    gone = shell(sys.executable, "-c", "import os; print(os.getpid())").stdout
    monkeypatch.setattr(torchrun, "SECONDS_FOR_OTHER_RANKS", 30.0)
    threading.Timer(0.1, (folder / "1" / "ending").write_text, [gone]).start()
    began = time.monotonic()
    assert end_with(UserError("all find it")) == 2 and time.monotonic() - began < 20


def test_an_error_that_another_rank_has_caused_counts_as_later(launched):
    folder = launched(0)
    assert end_with(RankGoneError("another rank has ended")) == 2
    line, later = left(folder)
    assert line == "error: another rank has ended"
    assert end_with(RankError("the cause")) == 2
    assert left(folder)[1] < later


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_torchruns_report_is_short_and_ends_with_the_line(num_ranks, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [f"--nproc_per_node={num_ranks}", ROOT / "dlrm_s_pytorch.py", "--nepochs=0"]
    done = shell(*launcher, *program, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("error: argument --nepochs") == 1
    assert lines[-2].startswith("  error: argument --nepochs: '0' is not"), lines[-2]
    assert "SIGTERM" not in done.stderr and "<NO_OTHER_FAILURES>" in done.stderr


def test_a_rank_whose_errors_go_to_a_file_prints_there(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--redirects=2"]
    program = [f"--log_dir={tmp_path}/logs", ROOT / "dlrm_s_pytorch.py", "--nepochs=0"]
    done = shell(*launcher, *program, cwd=tmp_path)
    (log,) = tmp_path.glob("logs/**/stderr.log")
    assert log.read_text().startswith("error: argument --nepochs: ")
    assert done.stderr.count("error: argument --nepochs") == 1


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Makes this process the first rank of an attempt, 0, 1, ...; returns the attempt's folder."""

    def become(number):
        own = tmp_path / f"attempt_{number}" / "0"
        own.mkdir(parents=True)
        values = {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none", torchrun.RESTARTS: str(number)}
        for name, value in (values | {torchrun.ERROR_FILE: str(own / "error.json")}).items():
            monkeypatch.setenv(name, value)
        return own.parent

    return become


@pytest.mark.parametrize("kind", [UserError, RankError])
def test_a_mistake_is_not_tried_again(kind, attempt, capsys):
    attempt(0)
    assert end_with(kind("the disk is upside down")) == 2
    for number in (1, 2):
        folder = attempt(number)
        assert end_with(AssertionError("it was tried again")) == 2
        assert left(folder)[0] == "error: the disk is upside down"
    assert capsys.readouterr().err == "error: the disk is upside down\n" * 3


@pytest.mark.parametrize(
    "error",
    [RankGoneError("x"), PassingError("x"), MemoryError("x"), OSError(28, "No space left", "x")],
)
def test_an_error_that_may_pass_is_tried_again(error, attempt):
    attempt(0)
    assert end_with(error) == 2
    attempt(1)
    with pytest.raises(AssertionError, match="it was tried again"):
        end_with(AssertionError("it was tried again"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"message": "Traceback"}', '{"message": {}}'])
def test_what_another_program_has_left_ends_no_attempt(content, attempt):
    (attempt(0) / "0" / "error.json").write_text(content)
    attempt(1)
    with pytest.raises(AssertionError, match="it was tried again"):
        end_with(AssertionError("it was tried again"))


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHORT = [*SMALL_MODEL, "--num-batches=4", "--tensor-board-filename="]
DIES_ONCE = """
import os, signal, sys
import dlrm_s_pytorch as dlrm

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    dlrm.Trainer.evaluate_and_save = lambda self: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(dlrm.main())
"""


def test_torchrun_tries_a_loss_that_is_nan_once(tmp_path):
    command = [*TWO_RANKS, "--max-restarts=2", ROOT / "dlrm_s_pytorch.py", *SHORT]
    done = shell(*command, "--learning-rate=1e30", cwd=tmp_path)
    assert done.returncode == 1
    assert len(re.findall("^Finished training it 1/4 ", done.stdout, re.M)) == 1
    assert re.search("^  error: the loss became nan at it 2 of epoch 0", done.stderr, re.M)


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(tmp_path):
    program = tmp_path / "dies_once.py"
    program.write_text(DIES_ONCE)
    command = [*TWO_RANKS, "--max-restarts=1", program, *SHORT, "--test-freq=2"]
    done = shell(*command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^Finished training it 4/4 ", done.stdout, re.M)) == 1
    assert len(re.findall("^Finished training it 1/4 ", done.stdout, re.M)) == 2
