"""A training script that was stopped goes on when it is called again, and by itself if it can."""

import os
import re
import shutil
import signal
import subprocess
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


KEEP = """
source "{copy}/test/common.sh"
OUTPUT={output} CASE=case EXTRA=({extra}) FRESH={fresh} FLAGS=()
keep_checkpoints
echo "${{FLAGS[@]}}"
"""


@pytest.mark.parametrize("there, fresh, extra, goes_on", [
    ([], "", "", False),
    (["000001-step-5"], "", "", True),
    (["000001-step-5"], "1", "", False),
    (["000001-step-5", "finished"], "", "", False),
    (["000001-step-5"], "", "--checkpoint_dir=mine", None),
    (["000001-step-5"], "", "--load-model=mine", None),
])  # fmt: skip
def test_checkpoints_are_kept_unless_the_last_run_has_finished(
    there, fresh, extra, goes_on, copy, tmp_path
):
    """--fresh starts anew, and nothing is done if the user has flags of his own."""
    saved = tmp_path / "checkpoints" / "case"
    for name in there:
        (saved / name).mkdir(parents=True)
    script = KEEP.format(copy=copy, output=tmp_path, fresh=fresh, extra=extra)
    done = shell("bash", "-c", script)
    assert done.returncode == 0, done.stderr
    ours = f"--checkpoint-dir={saved} --save-minutes=5 --resume"
    assert done.stdout.strip() == ("" if goes_on is None else ours)
    assert ("Going on" in done.stderr) == bool(goes_on)
    assert saved.exists() == (goes_on is not False)


FAIL = """
source "{copy}/test/common.sh"
OUTPUT={output} LOGS={output}/train CHECKPOINTS=''
report_failure
"""


def test_a_checkpoint_of_another_command_has_its_remedy(copy, tmp_path):
    (tmp_path / "train_0.log").write_text("error: --resume=x: --nepochs was 1, is 2: ...\n")
    done = shell("bash", "-c", FAIL.format(copy=copy, output=tmp_path))
    assert done.returncode == 1 and done.stderr.endswith("(this script: --fresh starts anew)\n")
