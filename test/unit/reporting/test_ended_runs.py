"""A training that SIGTERM ends says so in MLPerf's log, once, and leaves no half of a file."""

import os
import re
import signal
import socket
import sys
import time

import pytest
from conftest import ROOT, shell
from signalled import started
from test_mlperf_log import LOGGED, end_of, events_of

PROGRAM = ROOT / "dlrm_s_pytorch.py"
LONG = [*LOGGED, "--data-size=64000000", "--print-freq=5", "--tensor-board-filename="]
TERMINATED = ("aborted", "ended by SIGTERM")
# the program with something changed before its main
CHANGED = """
import os, sys, time
import dlrm_s_pytorch as dlrm
from common import termination
{change}
termination.skip_clean_up_if_ended(dlrm.main(sys.argv[1:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize("more", [[], ["--num-workers=2"]])
def test_sigterm_ends_the_log_with_a_reason(more, tmp_path):
    """It goes to the loaders too, as that of torchrun does."""
    with started(sys.executable, PROGRAM, *LONG, *more, cwd=tmp_path) as run:
        run.wait_for("Finished")
        os.killpg(run.process.pid, signal.SIGTERM)
        status, out, err = run.end()
    assert (status, err) == (143, "") and end_of(out) == TERMINATED
    keys = [event["key"] for event in events_of(out)]
    assert keys[-3:] == ["epoch_stop", "block_stop", "run_stop"]


def test_a_model_file_that_is_being_written_is_removed(tmp_path):
    change = "os.fsync = lambda file: (print('saving', flush=True), time.sleep(60))"
    words = ["-c", CHANGED.format(change=change), *LONG]
    flags = ["--num-batches=20", "--test-freq=10", f"--save-model={tmp_path}/m.pth"]
    with started(sys.executable, *words, *flags, cwd=tmp_path) as run:
        run.wait_for("saving")
        assert os.listdir(tmp_path) == ["m.pth.partial"]
        status, out, err = run.end(signal.SIGTERM)
    assert (status, err, os.listdir(tmp_path)) == (143, "", []) and end_of(out) == TERMINATED


def ranks_of(launcher):
    """Process numbers of torchrun's ranks: its children."""
    found = shell("ps", "-o", "pid=", "--ppid", launcher.process.pid)
    return sorted(int(word) for word in found.stdout.split())


def are_there(pids):
    return any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "whom", ["torchrun", pytest.param("rank 0", marks=pytest.mark.slow), "rank 1"]
)
def test_sigterm_to_one_of_several_ranks_ends_all_and_the_log_once(whom, tmp_path):
    """Rank 0 may see that rank 1 has gone before torchrun sends it SIGTERM."""
    with started(*TORCHRUN, PROGRAM, *LONG, cwd=tmp_path) as launcher:
        launcher.wait_for("Finished")
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        all_pids = {"torchrun": launcher.process.pid, "rank 0": ranks[0], "rank 1": ranks[1]}
        os.kill(all_pids[whom], signal.SIGTERM)
        status, out, err = launcher.end()
        why, reason = end_of(out)
        gone = r"rank \d has ended \(process \d+\): its own log says why"
        assert status and why == "aborted"
        assert reason == TERMINATED[1] or re.fullmatch(gone, reason)
        assert len(re.findall(r"^error: ", err, re.M)) <= 1
        deadline = time.monotonic() + 20
        while are_there(ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not are_there(ranks)


def test_a_rank_that_waits_for_another_one_does_not_outlive_sigterm(tmp_path):
    """It is inside gloo, where Python calls no handler; the other rank is stopped."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", CHANGED.format(change="termination.SECONDS_TO_UNWIND = 1")]
    with (
        started(*words, *LONG, cwd=tmp_path, RANK="0", **settings) as first,
        started(*words, *LONG, cwd=tmp_path, RANK="1", **settings) as second,
    ):
        first.wait_for("Finished")
        second.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # a step is done in milliseconds
        began = time.monotonic()
        status, out, err = first.end(signal.SIGTERM)
    assert (status, err) == (143, "") and end_of(out) == TERMINATED
    assert 1 <= time.monotonic() - began < 20
