"""Each run of a script has a folder; logs and results are links to those of the newest run."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from conftest import PYTHON_FIRST, ROOT, shell

BEGIN = """
source "{root}/test/common.sh"
OUTPUT={output} LOGS={output}/train KIND=train NPROC=2 CALLED_FROM={output}
CASE=${{CASE:-DLRM_bs1_2p_acc}} CHECKPOINTS=$OUTPUT/checkpoints/$CASE FLAGS=() EXTRA=({extra})
begin_run
echo "$RUN"
echo "${{FLAGS[@]}}"
"""


def begin(output, *extra, goes_on="", case=""):
    """Begin a run and write into its log; returns (its folder, the flags that are added)."""
    script = BEGIN.format(root=ROOT, output=output, extra=" ".join(extra))
    done = shell("bash", "-c", script, env={"GOES_ON": goes_on, "CASE": case})
    assert done.returncode == 0, done.stderr
    run, flags = done.stdout.splitlines()
    return Path(run), flags


def add(output, text):
    with open(output / "train_0.log", "a") as log:
        log.write(text)


def test_a_run_has_a_folder_of_its_name_and_links_lead_to_it(tmp_path):
    run, flags = begin(tmp_path)
    assert run.parent == tmp_path / "runs" and flags == f"--run-dir={run}"
    assert re.fullmatch(r"\d{8}-\d{6}_DLRM_bs1_2p_acc", run.name)
    add(tmp_path, "a line\n")
    assert (run / "train_0.log").read_text() == "a line\n"
    links = {path.name: os.readlink(path) for path in tmp_path.iterdir() if path.is_symlink()}
    names = ("train_0.log", "train_1.log", "launcher.log")
    assert links == {name: f"runs/{run.name}/{name}" for name in names}
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.name == f"DLRM_bs1_2p_acc_{run.name.split('_')[0]}"
    assert os.readlink(board) == f"../runs/{run.name}/tensorboard"


def test_a_run_that_goes_on_does_so_in_its_folder_though_another_one_was_between(tmp_path):
    """Errors of before are no errors of this run; other ranks' logs begin anew."""
    run, _ = begin(tmp_path)
    add(tmp_path, "its first line\nerror: the disk is full\n")
    (tmp_path / "train_1.log").write_text("error: old\n")
    other, _ = begin(tmp_path, case="DLRM_bs2_2p_acc")
    add(tmp_path, "another run's line\n")
    assert other != run and (run / "train_1.log").exists()
    again, flags = begin(tmp_path, goes_on="1")
    assert again == run and flags == f"--run-dir={run}"
    assert (tmp_path / "train_0.log").read_text() == "its first line\n"
    assert not (run / "train_1.log").exists()
    assert (other / "train_0.log").read_text() == "another run's line\n"


def test_logs_of_a_version_without_run_folders_are_continued(tmp_path):
    (tmp_path / "train_0.log").write_text("of before\nerror: no\n")
    (tmp_path / "launcher.log").write_text("of before\n")
    run, _ = begin(tmp_path, goes_on="1")
    assert (run / "train_0.log").read_text() == "of before\n"
    assert (tmp_path / "train_0.log").is_symlink() and (tmp_path / "launcher.log").is_symlink()


def test_a_new_run_begins_with_empty_logs(tmp_path):
    (tmp_path / "train_0.log").write_text("of before\n")
    begin(tmp_path)
    assert (tmp_path / "train_0.log").read_text() == ""


def test_a_folder_of_the_users_own_is_taken(tmp_path):
    run, flags = begin(tmp_path, "--run_dir", "mine", "--tensor-board-filename=x")
    assert run == tmp_path / "mine" and flags == ""
    assert os.readlink(tmp_path / "train_0.log") == f"{tmp_path}/mine/train_0.log"
    assert not any((tmp_path / "tensorboard").iterdir())


def test_machines_that_share_a_folder_touch_no_logs_of_one_another(tmp_path):
    """The first one removes those of ranks that there are no more, too."""
    mine = tmp_path / "mine"
    mine.mkdir()
    ranks = range(6)

    def left_by(node_rank):
        for rank in ranks:
            (mine / f"train_{rank}.log").write_text("of before\n")
        output = tmp_path / f"node{node_rank}"
        script = BEGIN.format(root=ROOT, output=output, extra="--run-dir=" + str(mine))
        machine = f"NNODES=2 NODE_RANK={node_rank} FIRST_RANK={2 * node_rank}\nbegin_run"
        done = shell("bash", "-c", script.replace("begin_run", machine))
        assert done.returncode == 0, done.stderr
        logs = [mine / f"train_{rank}.log" for rank in ranks]
        texts = [log.read_text() if log.exists() else None for log in logs]
        return texts, os.readlink(output / "launcher.log")

    old = "of before\n"
    assert left_by(0) == (["", None, old, old, None, None], f"{mine}/launcher.log")
    assert left_by(1) == ([old, old, "", None, old, old], f"{mine}/launcher_node1.log")


@pytest.mark.parametrize("name", ["", "../../elsewhere_DLRM_bs1_2p_acc", "20260101-000000_other"])
def test_a_name_that_nobody_has_written_is_not_taken(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "DLRM_bs1_2p_acc.run").write_text(name)
    run, _ = begin(tmp_path, goes_on="1")
    assert re.fullmatch(r"\d{8}-\d{6}_DLRM_bs1_2p_acc", run.name)
    assert run.parent == tmp_path / "runs"


def test_the_report_is_left_beside_the_picture(tmp_path):
    (tmp_path / "run").mkdir()
    leave = f"source {ROOT}/test/common.sh; RUN={tmp_path}/run CALLED_FROM={tmp_path}; leave_report"
    assert shell("bash", "-c", leave).returncode == 0
    assert not (tmp_path / "DLRM.html").exists()
    (tmp_path / "run" / "report.html").write_text("a page")
    assert shell("bash", "-c", leave).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "DLRM.html"}


FOLLOW = """
source "{root}/test/common.sh"
RUN={run} KIND=train PYTHON=python3
sleep 2.5 & LAUNCHER=$!
trap 'echo passed on' INT
follow_log 1 & follower=$!
sleep 1.5
kill -INT "$follower"
printf 'last line\\n' >>"$RUN/train_0.log"
wait "$LAUNCHER"
wait "$follower"
"""


def output_of(script, terminal):
    """What a script prints to a terminal, or into a pipe."""
    if not terminal:
        return shell("bash", "-c", script, env=PYTHON_FIRST).stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        ["bash", "-c", script], stdout=theirs, env=os.environ | PYTHON_FIRST
    ) as process:
        os.close(theirs)
        found = b""
        while True:
            try:
                found += os.read(ours, 1 << 16)
            except OSError:  # nobody writes any more
                break
    os.close(ours)
    assert process.returncode == 0
    return found.decode().replace("\r\n", "\n")


@pytest.mark.skipif(not shutil.which("tail"), reason="a pipe is fed by tail")
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_and_a_pipe_has_none(tmp_path, terminal):
    """Ctrl-C ends neither: ranks save then, and their lines are shown. The log has no bar."""
    text = "Finished training it 10/40 of epoch 0, 100.00 ms/it, loss 0.500000\n"
    (tmp_path / "train_0.log").write_text(text)
    shown = output_of(FOLLOW.format(root=ROOT, run=tmp_path), terminal)
    if terminal:
        assert re.search(r"epoch 0 +\d+%\|.*\| \d+/40", shown)
    else:
        assert shown == text + "last line\n"
    assert text in shown and "last line\n" in shown
    assert (tmp_path / "train_0.log").read_text() == text + "last line\n"
