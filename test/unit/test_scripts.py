"""The scripts are run as a user runs them: from another folder, in a copy without .venv."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GOLDEN, PYTHON_FIRST, ROOT, shell

LATER = {"metrics.jsonl", "report.html"}  # if the program has their flags
TINY_MLPS = ["--arch-mlp-bot=13-32-16", "--arch-mlp-top=32-1"]


def script(copy, name, *argv, cwd, timeout=400, **settings):
    env = PYTHON_FIRST | settings
    return shell("bash", copy / "test" / name, *argv, cwd=cwd, env=env, timeout=timeout)


def results(copy, case, device_id=0):
    lines = (copy / "test" / "output" / str(device_id) / f"{case}.log").read_text().splitlines()
    return dict(line.split(" = ") for line in lines)


def final(text):
    found = re.search(
        r"-{18} Final result -{18}\nFinal Performance images/sec : ([\d.]+|none)\n"
        r"Final Train Accuracy : ([\d.]+|none)\nE2E Training Duration sec : (\d+)\n",
        text,
    )
    assert found, text
    return tuple(math.nan if text == "none" else float(text) for text in found.groups()[:2])


def test_kaggle_on_one_rank_then_its_model_evaluated_on_two(copy, tmp_path):
    data, here = tmp_path / "data", tmp_path / "here"
    shutil.copytree(GOLDEN / "data" / "kaggle", data)
    here.mkdir()
    device, whole = ["--device=cpu", "--device_id=3"], ["--", "--data-sub-sample-rate=0"]
    done = script(copy, "train_full_1p.sh", "--data_path", "../data", *device, *whole, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "Finished training it 47/47" in done.stdout
    facts = results(copy, "DLRM_bs128_1p_acc", device_id=3)
    assert facts["Network"] == "DLRM" and facts["RankSize"] == "1"
    assert "\r" not in done.stdout, "a bar is for terminals"
    (run,) = (copy / "test" / "output" / "3" / "runs").iterdir()
    assert run.name.endswith("_DLRM_bs128_1p_acc") and f"run: {run}\n" in done.stdout
    assert {"train_0.log", "DLRM_bs128_1p_acc.log", "launcher.log", "flags.json", "versions.json",
            "tensorboard"} == {path.name for path in run.iterdir()} - LATER  # fmt: skip
    assert (run / "train_0.log").read_text().count("Finished training it 47/47") == 1
    content = torch.load(here / "DLRM.pth", weights_only=True)
    assert content["state_dict"]["emb_l.0.weight"].shape[1] == 16
    options = [f"--data_path={data}", *device, "--nproc=2"]
    output = copy / "test" / "output" / "3"
    log = (output / "train_0.log").read_text()
    evaluated = script(copy, "train_eval_8p.sh", *options, *whole, cwd=here)
    assert evaluated.returncode == 0, evaluated.stderr
    assert final(evaluated.stdout)[1] == pytest.approx(float(facts["TrainAccuracy"]), abs=2e-4)
    assert (output / "train_0.log").read_text() == log, "the training's log is still there"
    assert {path.name for path in output.glob("*_[0-9].log")} == {
        "train_0.log", "eval_0.log", "eval_1.log",
    }  # fmt: skip
    boards = sorted(path.name for path in (output / "tensorboard").iterdir())
    assert [name.rpartition("_")[0] for name in boards] == [
        "DLRM_bs128_1p_acc", "DLRM_bs128_2p_eval",
    ]  # fmt: skip
    assert all(any((output / "tensorboard" / name).glob("events.*")) for name in boards)
    assert len(list((output / "runs").iterdir())) == 2


def test_terabyte_performance_on_one_rank(copy, tmp_path):
    shutil.copytree(GOLDEN / "data" / "terabyte", tmp_path / "data")
    options = [f"--data-path={tmp_path}/data", "--device=cpu", "--", "--mini_batch_size=64"]
    done = script(copy, "train_performance_1p.sh", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"^Finished training it (\d+)/\1 of epoch (\d+),", done.stdout, re.M)
    assert [int(epoch) for _, epoch in epochs] == [*range(11)], "of 512 steps, or an epoch"
    assert (copy / "test" / "output" / "0" / "perf_0.log").read_text() in done.stdout
    (board,) = (copy / "test" / "output" / "0" / "tensorboard").glob("DLRM_bs64_1p_perf_*")
    assert re.fullmatch(r"DLRM_bs64_1p_perf_\d{8}-\d{6}", board.name)
    assert results(copy, "DLRM_bs64_1p_perf")["BatchSize"] == "64"
    times = [float(ms) for ms in re.findall(r", ([\d.]+) ms/it", done.stdout)]
    assert final(done.stdout)[0] == pytest.approx(64 * 1000 / np.mean(times[1:]), rel=1e-3)


@pytest.mark.parametrize(
    "device, batch_size, steps",
    [
        ("cpu", 128, 256),  # Kaggle: 1.6 s a line at 6.2 ms a step, which the first 16 steps exceed
        ("cpu", 1024, 32),
        ("cpu", 32768, 2),
        ("npu", 128, 1024),
        ("gpu", 32768, 100),
    ],
)
def test_a_line_of_a_measurement_lasts_long_enough_to_hold_all_warm_up(device, batch_size, steps):
    function = f"DEVICE={device} BATCH_SIZE={batch_size}; steps_per_line"
    done = shell("bash", "-c", f"source {ROOT}/test/common.sh; {function}")
    assert done.stdout == f"{steps}\n", done.stderr


GONE = "error: rank 2 has ended (process 17): its own log says why\n"


@pytest.mark.parametrize(
    "logs, shown",
    [
        ([GONE, "error: a card is hot\n"], "error: train_1.log: a card is hot\n"),
        ([GONE, "Traceback (most recent call last):\n"], "train_1.log\n"),
        (["Finished\n" + GONE, "killed\n"], f"error: train_0.log: {GONE.removeprefix('error: ')}"),
        (["Finished\n", ""], "launcher.log\n"),
        (
            ["error: rank 2 gives no sign of life (process 7 on b): its own log says why\n"],
            "its own log says why, or that machine's script was stopped\n",
        ),
    ],
)
def test_the_log_that_says_why_is_shown(logs, shown, tmp_path):
    for rank, text in enumerate(logs):
        (tmp_path / f"train_{rank}.log").write_text(text)
    (tmp_path / "launcher.log").write_text("rank 2 was killed\n")
    function = f"OUTPUT={tmp_path} LOGS={tmp_path}/train; report_failure"
    done = shell("bash", "-c", f"source {ROOT}/test/common.sh; {function}", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith(shown), done.stderr


DEMO = {"60 batches": (["--", "--num-batches=60", "--test-freq=60"], 0.13), "whole": ([], 0.03)}


@pytest.mark.parametrize("length", ["60 batches", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_demo_with_8_ranks_comes_near_the_bayes_auc(length, copy, tmp_path):
    """This is the README's first command; a second run sets up, makes and prepares nothing."""
    flags, distance = DEMO[length]
    done = script(copy, "train_full_8p.sh", "--demo", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fps, auc = final(done.stdout)
    bayes = float(re.search(r"Bayes AUC (0\.\d+)", done.stdout)[1])
    assert bayes - distance <= auc < bayes
    assert fps > 0
    left = {"DLRM.html", "DLRM.png", "DLRM.pth", "DLRM.vocabulary"}
    assert {path.name for path in tmp_path.iterdir()} == left
    facts = results(copy, "DLRM_bs1024_8p_acc")
    told = {"RankSize": "8", "BatchSize": "1024", "DeviceType": "cpu"}
    assert told.items() <= facts.items()
    assert float(facts["TrainAccuracy"]) == auc and float(facts["ActualFPS"]) == fps
    assert 0.3 < float(facts["ActualLoss"]) < 0.6
    logs = sorted(path.name for path in (copy / "test" / "output" / "0").glob("train_*.log"))
    assert logs == [f"train_{rank}.log" for rank in range(8)]
    assert not (copy / ".venv").exists(), "the Python at hand has all that is needed"
    saved = torch.load(tmp_path / "DLRM.pth", weights_only=True)
    assert saved["test_auc"] == pytest.approx(auc, abs=1e-4)

    again = script(copy, "train_performance_8p.sh", "--demo", "--", "--dry-run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for word in ("Setting up", "Installing", "Made ", "Prepared "):
        assert word not in again.stdout + again.stderr, word


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], "no data: give --data_path=DIR"),
        (["--data_path=/no/such"], "--data_path=/no/such: no such folder"),
        (["--demo", "--data_path=."], "give one of them"),
        (["--demo", "--device=tpu"], "expected npu, gpu or cpu"),
        (["--demo", "--nproc=0"], "--nproc=0"),
        (["--demo", "--batch_size=x"], "--batch_size=x"),
        (["--demo", "--epochs=3"], "unknown option --epochs"),
        (["--data_path"], "--data_path wants a value"),
        (["demo"], "unexpected argument demo"),
        pytest.param(["--data_path=."], "neither day_0", marks=pytest.mark.slow),
        (["--data_path=.", "--device=cpu", "--", "--nepochs=0"], "--nepochs"),
    ],
)
def test_mistakes_are_one_line_and_status_2(copy, tmp_path, argv, words):
    done = script(copy, "train_full_8p.sh", *argv, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    said = [line for line in done.stderr.splitlines() if not line.startswith("Training on: ")]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_missing_is_an_error(copy, tmp_path):
    """test_errors.py has the other devices; test_npu.py has fewer cards than ranks."""
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    options = [f"--data_path={tmp_path}/data", "--device=npu"]
    done = script(copy, "train_full_8p.sh", *options, cwd=tmp_path)
    assert done.returncode == 2 and "torch_npu is not installed" in done.stderr


def test_a_failing_rank_ends_all_and_its_line_is_shown(copy, tmp_path):
    """The second of two ranks reads a row with an id outside its table."""
    rows = np.zeros((60, 40), np.int32)
    rows[:, 0] = np.arange(60) % 2
    bad = rows.copy()
    bad[29, 20] = 7
    for split, part in (("train", bad), ("test", rows), ("val", rows)):
        part.tofile(tmp_path / f"x_{split}.bin")
    np.savez(tmp_path / "day_fea_count.npz", counts=np.ones(26))
    for day in range(2):
        (tmp_path / f"day_{day}").write_text("not read\n")
    extra = ["--mlperf-bin-loader", f"--processed-data-file={tmp_path}/x"]
    options = [f"--data_path={tmp_path}", "--device=cpu", "--nproc=2", "--batch_size=30"]
    argv = [*options, "--", *extra]
    done = script(copy, "train_full_8p.sh", *argv, cwd=tmp_path, MAX_RESTARTS="0")
    assert done.returncode == 1
    assert (
        f"train_1.log: row 29 of {tmp_path}/x_train.bin" in done.stderr
        and "id 7 of table 6" in done.stderr
    )
    assert "end of " in done.stderr and "ChildFailedError" not in done.stderr + done.stdout
    assert "Final result" not in done.stdout and not (tmp_path / "DLRM.pth").exists()


@pytest.mark.slow
def test_a_traceback_of_a_rank_is_shown_not_the_launchers(copy, tmp_path):
    """The script shows the end of the rank's log if a bug, not a user's mistake, has ended it."""
    broken = tmp_path / "broken"
    shutil.copytree(copy, broken, ignore=shutil.ignore_patterns("demo_data", "output"))
    with open(broken / "model" / "losses.py", "a") as file:
        file.write("\n\ndef make_loss(*_):\n    raise ZeroDivisionError('a bug')\n")
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    options = [f"--data_path={tmp_path}/data", "--device=cpu", "--nproc=1"]
    done = script(broken, "train_full_8p.sh", *options, cwd=tmp_path, MAX_RESTARTS="0")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr and "Root Cause" not in done.stderr


def running(needle):
    found = subprocess.run(
        ["pgrep", "-f", str(needle)], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def take_interrupts():
    """Undo what a job in the background does: bash cannot trap a signal that its parent ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not shutil.which("pgrep"), reason="looks for processes with pgrep")
@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_ctrl_c_and_sigterm_stop_all_ranks(number, status, copy, tmp_path):
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the script alone."""
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    mine = tmp_path / "mine"
    shutil.copytree(copy, mine, ignore=shutil.ignore_patterns("demo_data", "output"))
    options = [f"--data_path={tmp_path}/data", "--device=cpu", "--nproc=2", "--", *TINY_MLPS]
    with subprocess.Popen(
        ["bash", mine / "test" / "train_full_8p.sh", *options, "--nepochs=10000"],
        cwd=tmp_path, env=os.environ | PYTHON_FIRST, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=take_interrupts,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("Finished training"):
                break
        assert len(running(f"{mine}/dlrm_s_pytorch.py")) >= 2
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    log = (mine / "test" / "output" / "0" / "train_0.log").read_text()
    assert log.count('"run_stop"') == log.count('"aborted"') == 1, "MLPerf's log has its end"
    deadline = time.monotonic() + 20
    while running(f"{mine}/dlrm_s_pytorch.py") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(f"{mine}/dlrm_s_pytorch.py") == []


def by_hand(copy, folder, *flags):
    """Two ranks of the program, which torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [copy / "dlrm_s_pytorch.py", f"--data_path={folder}/data", "--num-batches=2"]
    return shell(*launcher, *program, *flags, cwd=folder)


def test_ranks_started_by_hand_prepare_once(copy, tmp_path):
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    done = by_hand(copy, tmp_path, "--tensor-board-filename=")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Prepared 7003 rows") == 1
    assert done.stdout.count("Finished training") == 2


@pytest.mark.slow
def test_ranks_started_by_hand_say_an_error_once(copy, tmp_path):
    """Prepared data is not what the flags ask for."""
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    assert by_hand(copy, tmp_path, "--tensor-board-filename=").returncode == 0
    wrong = by_hand(copy, tmp_path, "--max-ind-range=5")
    assert wrong.returncode != 0
    assert len(re.findall(r"^ *error: ", wrong.stderr, re.M)) == 1
    assert wrong.stderr.splitlines()[-2].startswith("  error: ")


@pytest.mark.slow
def test_set_up_makes_a_venv_if_the_python_at_hand_lacks_packages(copy, tmp_path):
    """Everything is installed into .venv, once. Needs a package index; takes minutes."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    target = tmp_path / "dlrm"
    shutil.copytree(copy, target, ignore=shutil.ignore_patterns("demo_data", "output"))
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    environment = {"PATH": f"{bare}/bin{os.pathsep}/usr/bin{os.pathsep}/bin"}
    options = [f"--data_path={tmp_path}/data", "--device=cpu"]
    command = ["bash", target / "test" / "train_full_1p.sh", *options]
    first = shell(*command, cwd=tmp_path, env=environment, timeout=1200)
    assert first.returncode == 0, first.stderr
    assert "Setting up" in first.stderr and (target / ".venv").is_dir()
    assert "Installing" not in shell(*command, cwd=tmp_path, env=environment).stderr
