"""Under torchrun an error is said once, at the end of its report, and one rank is reported."""

import json
import os
import sys
import threading
import time

import pytest
from conftest import ROOT, shell

from common import torchrun
from common.errors import RankError, RankGoneError, UserError, reports_errors


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


@pytest.mark.parametrize("num_ranks", [1, 3])
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
