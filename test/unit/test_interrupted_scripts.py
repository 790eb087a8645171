"""A training script that was stopped goes on when it is called again, and by itself if it can."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, PYTHON_FIRST, shell

FLAGS = (
    "--arch-mlp-bot=13-32-16 --arch-mlp-top=32-1 --nepochs=6 --print-freq=10 --test-freq=40"
    " --save-every=25 --data-sub-sample-rate=0 --mlperf-events=false"
).split()


def take_interrupts():
    """Undo what a job in the background does: bash cannot trap a signal that its parent ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def call(copy, folder, device_id, *options, until="", act=lambda script: None):
    """Call the script; once a line begins with `until`, act. Returns (status, output, stderr)."""
    command = ["bash", copy / "test" / "train_full_8p.sh", f"--data_path={folder}/data"]
    command += ["--device=cpu", "--nproc=2", f"--device_id={device_id}", *options, "--", *FLAGS]
    with (
        open(folder / "errors", "w+") as errors,
        subprocess.Popen(
            command, cwd=folder, env=os.environ | PYTHON_FIRST | {"OMP_NUM_THREADS": "1"},
            start_new_session=True, stdout=subprocess.PIPE, stderr=errors, text=True,
            preexec_fn=take_interrupts,
        ) as script,
    ):  # fmt: skip
        lines = []
        for line in script.stdout:
            lines.append(line)
            if until and line.startswith(until):
                until = ""
                act(script)
        status = script.wait(timeout=100)
        errors.seek(0)
        return status, "".join(lines), errors.read()


def rank_of(output, rank):
    """The process of a rank whose logs are there."""
    ours = {f"LOGS={output}/train".encode(), f"RANK={rank}".encode()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            settings = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours <= set(settings):
            return int(path.name)
    raise AssertionError("no such rank")


def interrupt(script):
    """Ctrl-C: the terminal sends it to the foreground's process group."""
    os.killpg(script.pid, signal.SIGINT)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for ranks in /proc")
def test_it_goes_on_after_ctrl_c_and_after_a_killed_rank_and_loses_nothing(copy, tmp_path):
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    model, output = tmp_path / "DLRM.pth", copy / "test" / "output"
    status, whole, errors = call(copy, tmp_path, 5)
    assert status == 0, errors
    content = model.read_bytes()
    model.unlink()

    early = "Finished training it 20/47 of epoch 1"
    status, _, errors = call(copy, tmp_path, 6, until=early, act=interrupt)
    assert status == 130
    assert "the same command goes on from the last checkpoint" in errors
    saved = output / "6" / "checkpoints" / "DLRM_bs128_2p_acc"
    assert not (saved / "finished").exists()

    def kill_a_rank(script):
        os.kill(rank_of(output / "6", 1), signal.SIGKILL)

    late = "Finished training it 30/47 of epoch 3"
    status, out, errors = call(copy, tmp_path, 6, until=late, act=kill_a_rank)
    assert status == 0, errors
    assert "Going on from the last checkpoint" in errors
    assert out.count("resumed from ") == 2, "when it was called, and when a rank was killed"
    assert model.read_bytes() == content
    assert re.search(r"^best AUC .* saved in .*/DLRM.pth$", out, re.M)
    accuracy = re.search(r"^Final Train Accuracy : (.*)$", out, re.M)[1]
    assert f"Final Train Accuracy : {accuracy}\n" in whole
    assert (saved / "finished").exists()
    log = (output / "6" / "train_0.log").read_text()
    assert "of epoch 0" in log and "it 47/47 of epoch 5" in log, "the log has the whole run"
    (run,) = (output / "6" / "runs").iterdir()
    assert (run / "train_0.log").read_text() == log, "it goes on in the folder that it had"


KEEP = """
source "{copy}/test/common.sh"
OUTPUT={output} CASE=case EXTRA=({extra}) FRESH={fresh} FLAGS=()
keep_checkpoints
look_for_checkpoints
echo "${{FLAGS[@]}}"
"""


@pytest.mark.parametrize("there, finished, fresh, extra, goes_on", [
    ([], False, "", "", False),
    (["000001-step-5"], False, "", "", True),
    (["000001-step-5"], False, "1", "", False),
    (["000001-step-5"], True, "", "", False),
    (["000001-step-5"], False, "", "--checkpoint_dir=mine", None),
    (["000001-step-5"], False, "", "--load-model=mine", None),
])  # fmt: skip
def test_checkpoints_are_kept_unless_the_last_run_has_finished(
    there, finished, fresh, extra, goes_on, copy, tmp_path
):
    """--fresh starts anew, and nothing is done if the user has flags of his own."""
    saved = tmp_path / "checkpoints" / "case"
    for name in there:
        (saved / name).mkdir(parents=True)
    if finished:
        (saved / "finished").touch()
    script = KEEP.format(copy=copy, output=tmp_path, fresh=fresh, extra=extra)
    done = shell("bash", "-c", script)
    assert done.returncode == 0, done.stderr
    ours = f"--checkpoint-dir={saved} --save-minutes=5 --resume"
    assert done.stdout.strip() == ("" if goes_on is None else ours)
    assert ("Going on" in done.stderr) == bool(goes_on)
    names = {path.name for path in saved.iterdir()} if there else set()
    assert names == (set() if goes_on is False else set(there))


BEGIN = """
source "{copy}/test/common.sh"
DEVICE_ID=8 KIND={kind} OUTPUT={output}
keep_others_out
echo mine
[ "$1" != wait ] || read -r
"""


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock nobody is kept out")
def test_a_second_run_of_a_kind_is_refused_and_touches_nothing(copy, tmp_path):
    """Logs and checkpoints have the same names: it would remove those of the first one."""
    script = BEGIN.format(copy=copy, kind="train", output=tmp_path)
    with subprocess.Popen(
        ["bash", "-c", script, "", "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "mine\n"
        second = shell("bash", "-c", script)
        assert second.returncode == 2 and "give another --device_id" in second.stderr
        other_kind = shell("bash", "-c", BEGIN.format(copy=copy, kind="perf", output=tmp_path))
        assert other_kind.stdout == "mine\n"
        first.stdin.close()
    assert shell("bash", "-c", script).stdout == "mine\n"


STOP = """
source "{copy}/test/common.sh"
CHECKPOINTS='' follower=''
set -m
bash -c '
    {python} -u {rank} &
    trap "kill -TERM $!" TERM
    while kill -0 $! 2>/dev/null; do wait $!; done
' &
LAUNCHER=$!
set +m
trap 'stop_ranks INT 130' INT
wait "$LAUNCHER"
"""
RANK = """
import signal, sys, time

asked = []

def ask(*_):
    asked.append(1)
    print("asked", len(asked))
    if len(asked) == 2:
        sys.exit(1)

signal.signal(signal.SIGTERM, ask)
print("ready")
time.sleep(10)
"""


@pytest.mark.skipif(not shutil.which("pkill"), reason="without pkill a second signal does nothing")
def test_a_second_ctrl_c_reaches_the_ranks_too(copy, tmp_path):
    """They leave their save then, as their line promises."""
    (tmp_path / "rank.py").write_text(RANK)
    script = STOP.format(copy=copy, python=sys.executable, rank=tmp_path / "rank.py")
    with subprocess.Popen(
        ["bash", "-c", script], start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=take_interrupts,
    ) as done:  # fmt: skip
        assert done.stdout.readline() == "ready\n"
        interrupt(done)
        assert done.stdout.readline() == "asked 1\n"
        interrupt(done)
        assert done.stdout.readline() == "asked 2\n"
        assert done.wait(timeout=20) == 130
        assert "all ranks have ended" in done.stderr.read()


FAIL = """
source "{copy}/test/common.sh"
OUTPUT={output} LOGS={output}/train CHECKPOINTS=''
report_failure
"""


def test_a_checkpoint_of_another_command_has_its_remedy(copy, tmp_path):
    (tmp_path / "train_0.log").write_text("error: --resume=x: --nepochs was 1, is 2: ...\n")
    done = shell("bash", "-c", FAIL.format(copy=copy, output=tmp_path))
    assert done.returncode == 1 and done.stderr.endswith("(this script: --fresh starts anew)\n")
